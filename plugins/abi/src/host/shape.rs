//! Shapes of rank 0 to 4 and their rules.

use std::fmt;

use super::Fault;
use crate::{ALL_AXES, BAD_ARGUMENT, BAD_SHAPE, MAX_ELEMENTS, MAX_RANK};

/// A shape padded with ones on the left to rank 4.
pub type Dims = [usize; MAX_RANK];

/// A tensor's own shape.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    rank: usize,
    /// Padded on the left, so that broadcasting is a comparison by position.
    dims: Dims,
}

impl Shape {
    /// Rank 0: one element.
    pub const SCALAR: Self = Self {
        rank: 0,
        dims: [1; MAX_RANK],
    };

    /// Checks rank, dimensions and size.
    pub fn new(shape: &[usize]) -> Result<Self, Fault> {
        if shape.len() > MAX_RANK {
            let message = format!("a tensor of rank {} (at most {MAX_RANK})", shape.len());
            return Err(Fault::new(BAD_SHAPE, message));
        }
        let mut dims = [1; MAX_RANK];
        dims[MAX_RANK - shape.len()..].copy_from_slice(shape);
        Self {
            rank: shape.len(),
            dims,
        }
        .checked()
    }

    /// The own dimensions.
    pub fn as_slice(&self) -> &[usize] {
        &self.dims[MAX_RANK - self.rank..]
    }

    /// The dimensions padded to rank 4.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// NumPy's broadcasting of two shapes.
    pub fn broadcast(&self, other: &Self) -> Result<Self, Fault> {
        let mut dims = self.dims;
        for (mine, &theirs) in dims.iter_mut().zip(&other.dims) {
            if *mine == 1 {
                *mine = theirs;
            } else if theirs != 1 && theirs != *mine {
                let message = format!("shapes {self:?} and {other:?} do not broadcast");
                return Err(Fault::new(BAD_SHAPE, message));
            }
        }
        Self {
            rank: self.rank.max(other.rank),
            dims,
        }
        .checked()
    }

    /// The shape of a matrix product.
    pub fn matmul(&self, other: &Self) -> Result<Self, Fault> {
        let [_, _, rows, inner] = self.dims;
        let [_, _, other_inner, columns] = other.dims;
        if self.rank < 2 || other.rank < 2 || inner != other_inner {
            let message = format!("matmul of {self:?} and {other:?}");
            return Err(Fault::new(BAD_SHAPE, message));
        }
        let batch = |shape: &Self| Self {
            rank: shape.rank,
            dims: [shape.dims[0], shape.dims[1], 1, 1],
        };
        let mut out = batch(self).broadcast(&batch(other))?;
        out.dims[2] = rows;
        out.dims[3] = columns;
        out.checked()
    }

    /// The position in the padded shape that `axis` means; `None` for all axes.
    pub fn reduction_axis(&self, axis: i32) -> Result<Option<usize>, Fault> {
        if axis == ALL_AXES {
            return Ok(None);
        }
        self.axis(axis).map(Some)
    }

    /// The position in the padded shape that `axis` means; negative ones count from the end.
    pub fn axis(&self, axis: i32) -> Result<usize, Fault> {
        let rank = i64::try_from(self.rank).unwrap_or(0);
        let from_start = if axis < 0 {
            i64::from(axis) + rank
        } else {
            i64::from(axis)
        };
        match usize::try_from(from_start) {
            Ok(index) if index < self.rank => Ok(MAX_RANK - self.rank + index),
            _ => {
                let message = format!("axis {axis} of a tensor of shape {self:?}");
                Err(Fault::new(BAD_ARGUMENT, message))
            }
        }
    }

    /// With one axis, or all, reduced.
    #[must_use]
    pub fn reduced(&self, axis: Option<usize>) -> Self {
        let Some(axis) = axis else {
            return Self::SCALAR;
        };
        let mut shape = *self;
        shape.dims[axis] = 1;
        shape
    }

    /// With two positions of the padded shape exchanged.
    #[must_use]
    pub fn swapped(&self, axis0: usize, axis1: usize) -> Self {
        let mut shape = *self;
        shape.dims.swap(axis0, axis1);
        shape
    }

    fn checked(self) -> Result<Self, Fault> {
        let elements = self
            .dims
            .iter()
            .try_fold(1_usize, |size, &dim| size.checked_mul(dim));
        match elements {
            Some(1..=MAX_ELEMENTS) => Ok(self),
            Some(0) => {
                let message = format!("a dimension of zero in {self:?}");
                Err(Fault::new(BAD_SHAPE, message))
            }
            _ => {
                let message =
                    format!("a tensor of shape {self:?} has over {MAX_ELEMENTS} elements");
                Err(Fault::new(BAD_SHAPE, message))
            }
        }
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dims: &[usize]) -> Shape {
        Shape::new(dims).unwrap()
    }

    #[test]
    fn broadcasting_is_numpys() {
        let both = |a: &[usize], b: &[usize]| shape(a).broadcast(&shape(b));
        assert_eq!(both(&[3, 1], &[4]).unwrap(), shape(&[3, 4]));
        assert_eq!(both(&[], &[2, 2]).unwrap(), shape(&[2, 2]));
        assert_eq!(both(&[3], &[4]).unwrap_err().status, BAD_SHAPE);
        // Two shapes that are small alone may be too large together.
        assert!(both(&[1 << 20, 1], &[1 << 20]).is_err());
    }

    #[test]
    fn axes_count_within_the_own_rank() {
        assert_eq!(shape(&[3, 4]).axis(0).unwrap(), 2);
        assert_eq!(shape(&[3, 4]).axis(-1).unwrap(), 3);
        assert!(shape(&[3, 4]).axis(2).is_err());
        assert!(shape(&[3, 4]).axis(-3).is_err());
        assert!(Shape::SCALAR.axis(0).is_err());
        assert_eq!(shape(&[3]).reduction_axis(ALL_AXES).unwrap(), None);
    }

    #[test]
    fn products_check_the_inner_axis_and_broadcast_the_rest() {
        let product = |a: &[usize], b: &[usize]| shape(a).matmul(&shape(b));
        assert_eq!(product(&[2, 3], &[3, 4]).unwrap(), shape(&[2, 4]));
        assert_eq!(product(&[5, 2, 3], &[3, 4]).unwrap(), shape(&[5, 2, 4]));
        assert!(product(&[2, 3], &[4, 3]).is_err());
        assert!(product(&[3], &[3, 4]).is_err());
    }

    #[test]
    fn absurd_shapes_are_refused() {
        for dims in [
            &[0_usize][..],
            &[usize::MAX, 2],
            &[1 << 31],
            &[1, 1, 1, 1, 1],
        ] {
            assert_eq!(Shape::new(dims).unwrap_err().status, BAD_SHAPE, "{dims:?}");
        }
    }
}
