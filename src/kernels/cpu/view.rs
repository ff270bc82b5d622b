//! A CPU tensor's memory.

use burn::backend::flex::FlexTensor;
use burn::backend::{DispatchDevice, Flex};
use burn::tensor::{DType, Device, Element, Tensor, TensorData};
use bytemuck::Pod;
use half::{bf16, f16};

use super::gemm::{Matrix, Operand};
use super::pack::{Stored, Strides};

/// Whether tensors of this device are in the CPU's memory.
pub fn is_cpu(device: &Device) -> bool {
    let device = device.clone().without_autodiff();
    matches!(device.as_dispatch(), DispatchDevice::Flex(_))
}

/// A tensor of these values; takes the memory over.
pub fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// The elements of an untracked CPU tensor, where they are.
pub struct View<const D: usize> {
    tensor: FlexTensor,
    /// Lengths of the axes.
    pub dims: [usize; D],
    /// Distances of neighbours along each axis, in elements.
    pub strides: [usize; D],
}

impl<const D: usize> View<D> {
    /// None when the tensor is tracked, on another device or not of floats that we compute with.
    pub fn of(tensor: &Tensor<D>) -> Option<Self> {
        if tensor.is_autodiff() || !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16)
        {
            return None;
        }
        let dims = tensor.dims();
        let mut tensor = tensor.clone().try_into_primitive::<Flex>().ok()?;
        if tensor.layout().strides().iter().any(|stride| *stride < 0) {
            tensor = tensor.to_contiguous(); // flipped
        }
        let strides = std::array::from_fn(|axis| tensor.layout().strides()[axis].unsigned_abs());
        Some(Self {
            tensor,
            dims,
            strides,
        })
    }

    /// The same in row-major order, copied where it is not.
    pub fn contiguous(tensor: &Tensor<D>) -> Option<Self> {
        let mut view = Self::of(tensor)?;
        if !view.tensor.is_contiguous() {
            view.tensor = view.tensor.to_contiguous();
            let layout = view.tensor.layout();
            view.strides = std::array::from_fn(|axis| layout.strides()[axis].unsigned_abs());
        }
        Some(view)
    }

    /// Elements in memory order from the first one on; as many as the tensor has when it is contiguous.
    ///
    /// # Panics
    /// When the elements are of another type.
    pub fn stored<T: Element + Pod>(&self) -> &[T] {
        &self.tensor.storage::<T>()[self.tensor.layout().start_offset()..]
    }

    /// As [`Self::stored`].
    pub fn f32(&self) -> &[f32] {
        self.stored()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// Whether the elements are f32.
    pub fn is_f32(&self) -> bool {
        self.tensor.dtype() == DType::F32
    }

    /// The elements from `offset` on as one side of a matrix product.
    pub fn operand(&self, offset: usize, strides: Strides) -> Box<dyn Operand + '_> {
        fn matrix<T: Stored>(data: &[T], strides: Strides) -> Box<dyn Operand + '_> {
            Box::new(Matrix { data, strides })
        }
        match self.tensor.dtype() {
            DType::F16 => matrix(&self.stored::<f16>()[offset..], strides),
            DType::BF16 => matrix(&self.stored::<bf16>()[offset..], strides),
            _ => matrix(&self.f32()[offset..], strides),
        }
    }
}
