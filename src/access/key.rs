//! A key's text: `lorasmith_`, 32 random bytes and a CRC-32 in hex. The prefix lets secret scanners find leaked keys,
//! the checksum tells a mistyped key without a look at the database.

use rand::TryRng as _;
use rand::rngs::SysRng;
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "lorasmith_";
const SECRET_BYTES: usize = 32;
/// Of the random part; 32 of 256 bits tell keys apart and give nothing away.
const HINT_CHARS: usize = 8;

/// Digest of a key. SHA-256 without salt or stretching: a key has 256 random bits, so that there is no list to try.
pub type KeyDigest = [u8; 32];

/// Makes a new key.
///
/// # Errors
/// When the system gives no randomness.
pub fn generate() -> Result<String, rand::rngs::SysError> {
    let mut secret = [0; SECRET_BYTES];
    SysRng.try_fill_bytes(&mut secret)?;
    let secret = hex::encode(secret);
    Ok(format!("{PREFIX}{secret}{}", checksum(&secret)))
}

/// Whether a text could be a key of ours.
pub fn is_well_formed(text: &str) -> bool {
    let Some(body) = text.strip_prefix(PREFIX) else {
        return false;
    };
    if body.len() != 2 * SECRET_BYTES + 8 || !body.is_ascii() {
        return false;
    }
    let (secret, given) = body.split_at(2 * SECRET_BYTES);
    given == checksum(secret)
}

/// What rows hold of a key.
pub fn digest(key: &str) -> KeyDigest {
    Sha256::digest(key).into()
}

/// The part of a key that may be shown.
pub fn hint(key: &str) -> String {
    key.chars().take(PREFIX.len() + HINT_CHARS).collect()
}

fn checksum(secret: &str) -> String {
    format!("{:08x}", crc32fast::hash(secret.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_key_is_told() {
        let key = generate().expect("randomness");
        assert!(is_well_formed(&key), "{key}");
        assert_ne!(key, generate().expect("randomness"));
        assert_eq!(hint(&key).len(), 18);
        let swapped = key.replacen(|c: char| c.is_ascii_digit(), "x", 1);
        for wrong in [
            &key[1..],
            &key[..key.len() - 1],
            &swapped,
            "",
            "lorasmith_é",
        ] {
            assert!(!is_well_formed(wrong), "{wrong}");
        }
    }
}
