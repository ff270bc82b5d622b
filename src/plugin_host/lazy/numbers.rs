//! Expressions of one element.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use lorasmith_abi::host::{Binary, Dims, Scalar, Unary};

use super::{Expression, LazyTensor};

/// Those of a step, by what they are: plugins compose the same ones for every parameter, and programs are alike only
/// where they share them.
#[derive(Default)]
pub struct Numbers(Mutex<HashMap<Key, LazyTensor>>);

impl Numbers {
    /// An expression; of one element the one that is the same.
    pub fn known(&self, dims: Dims, depth: u32, expression: Expression) -> LazyTensor {
        let new = |expression| LazyTensor::new(dims, depth, expression);
        match Key::of(&expression) {
            Some(key) if dims == [1; 4] => {
                let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                known.entry(key).or_insert_with(|| new(expression)).clone()
            }
            _ => new(expression),
        }
    }
}

/// An operation, the addresses of its arguments, and the bits of its numbers. The expressions that are known keep their
/// arguments alive.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    Full(u32),
    Unary(Unary, usize),
    Scalar(Scalar, usize, u32),
    Binary(Binary, [usize; 2]),
    Clamp(usize, [u32; 2]),
    Select([usize; 3]),
}

impl Key {
    fn of(expression: &Expression) -> Option<Self> {
        Some(match expression {
            Expression::Full(number) => Self::Full(number.to_bits()),
            Expression::Unary(op, a) => Self::Unary(*op, a.address()),
            Expression::Scalar(op, a, s) => Self::Scalar(*op, a.address(), s.to_bits()),
            Expression::Binary(op, a, b) => Self::Binary(*op, [a.address(), b.address()]),
            Expression::Clamp(a, low, high) => {
                Self::Clamp(a.address(), [low.to_bits(), high.to_bits()])
            }
            Expression::Select(a, b, c) => Self::Select([a.address(), b.address(), c.address()]),
            Expression::Leaf
            | Expression::Part(_)
            | Expression::Decoded(..)
            | Expression::Reduced(..) => return None,
        })
    }
}
