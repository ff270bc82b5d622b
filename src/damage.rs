//! Damage to valid files, for tests of what reads them.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// What is done to a valid file.
#[derive(Clone, Debug)]
pub enum Damage {
    Set(Index, u8),
    Flip(Index, u8),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    /// A number that says too much, wherever a length may be.
    Huge(Index),
    Cut(Index),
    Double,
}

/// One damage; small ones are more likely.
pub fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        6 => (any::<Index>(), any::<u8>()).prop_map(|(at, to)| Damage::Set(at, to)),
        6 => (any::<Index>(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        2 => (any::<Index>(), 1..40_usize).prop_map(|(at, count)| Damage::Remove(at, count)),
        2 => (any::<Index>(), vec(any::<u8>(), 1..40)).prop_map(|(at, new)| Damage::Insert(at, new)),
        3 => any::<Index>().prop_map(Damage::Huge),
        1 => any::<Index>().prop_map(Damage::Cut),
        1 => Just(Damage::Double),
    ]
}

/// The bytes with all of it done to them, in turn.
pub fn damaged(bytes: &[u8], all: &[Damage]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for damage in all {
        if bytes.is_empty() {
            break;
        }
        let length = bytes.len();
        match damage {
            Damage::Set(at, to) => bytes[at.index(length)] = *to,
            Damage::Flip(at, bit) => bytes[at.index(length)] ^= 1 << bit,
            Damage::Remove(at, count) => {
                let at = at.index(length);
                bytes.drain(at..(at + count).min(length));
            }
            Damage::Insert(at, new) => {
                let at = at.index(length);
                bytes.splice(at..at, new.iter().copied());
            }
            Damage::Huge(at) => {
                let at = at.index(length);
                bytes[at..(at + 4).min(length)].fill(0xff);
            }
            Damage::Cut(at) => bytes.truncate(at.index(length)),
            Damage::Double => bytes.extend_from_within(..),
        }
    }
    bytes
}
