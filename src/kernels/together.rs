//! Many tensors as one long one, so that what is done with all of them is done once.

use burn::backend::Cube;
use burn::tensor::{DType, Int, Tensor, TensorData};
use cubecl::prelude::{CubeCount, CubeDim};

/// In a long tensor each begins at a multiple of so many elements. Every device lets a buffer begin there: to take one
/// out is no copy.
pub const ALIGN: usize = 256;

/// Tensors that one launch copies, at most: on most devices a kernel can have 32 buffers.
const PARTS: usize = 28;
/// Threads of a workgroup.
const THREADS: u32 = 256;
/// Workgroups that copy one tensor, at most.
const GROUPS: usize = 64;

/// Where tensors of so many elements begin in a long one, and its length.
pub fn places(elements: impl IntoIterator<Item = usize>) -> (Vec<usize>, usize) {
    let mut length = 0;
    let begins = elements.into_iter().map(|own| {
        let begin = length;
        length += own.next_multiple_of(ALIGN);
        begin
    });
    (begins.collect(), length)
}

/// The tensors behind one another in one of `length` elements, each from its place in `begins`; `None` of nothing. What is
/// between them means nothing.
///
/// Those that lie so already are not copied.
///
/// # Shapes
/// - `tensors`: `[any]`, f32
/// - result: `[length]`
pub fn together(tensors: Vec<Tensor<1>>, begins: &[usize], length: usize) -> Option<Tensor<1>> {
    match neighbours(&tensors, begins, length) {
        Some(whole) => Some(whole),
        None => copied_together(tensors, begins, length),
    }
}

/// The same with zeros between them: they are copied, some at a launch, and each is let go once it was.
pub fn copied_together(
    tensors: Vec<Tensor<1>>,
    begins: &[usize],
    length: usize,
) -> Option<Tensor<1>> {
    let device = tensors.first()?.device();
    let mut whole = Tensor::zeros([length], (&device, DType::F32));
    let mut waiting = tensors.into_iter().zip(begins.iter().copied());
    loop {
        let parts: Vec<(Tensor<1>, usize)> = waiting.by_ref().take(PARTS).collect();
        if parts.is_empty() {
            return Some(whole);
        }
        if launch(&whole, &parts).is_none() {
            for (part, begin) in parts {
                let range = begin..begin + part.dims()[0];
                whole = whole.slice_assign([range], part);
            }
        }
    }
}

/// The piece of a buffer in which tensors lie behind one another already, on devices that have buffers.
pub fn neighbours(tensors: &[Tensor<1>], begins: &[usize], length: usize) -> Option<Tensor<1>> {
    let bytes = |elements: usize| (elements * size_of::<f32>()) as u64;
    let primitive = |tensor: &Tensor<1>| tensor.clone().try_into_primitive::<Cube>().ok();
    let mut whole = primitive(tensors.first()?)?;
    let start = whole.handle.offset_start.unwrap_or(0);
    for (tensor, &begin) in tensors.iter().zip(begins) {
        let part = primitive(tensor)?;
        let place = part.handle.offset_start.unwrap_or(0);
        let next = part.handle.memory.descriptor() == whole.handle.memory.descriptor()
            && place == start + bytes(begin)
            && part.dtype == DType::F32
            && part.meta.strides()[..] == [1];
        if !next {
            return None;
        }
    }
    let behind = whole.handle.size().checked_sub(start + bytes(length))?;
    whole.handle.offset_end = Some(behind);
    whole.meta.shape_mut()[0] = length;
    Some(Tensor::from_primitive::<Cube>(whole))
}

/// Copies the tensors to their places in `whole`, which nothing else may hold; `None` where that takes another way.
fn launch(whole: &Tensor<1>, parts: &[(Tensor<1>, usize)]) -> Option<()> {
    let target = whole.clone().try_into_primitive::<Cube>().ok()?;
    let client = target.client.clone();
    if parts.len() >= client.properties().hardware.max_bindings as usize {
        return None;
    }
    let mut sources = Vec::with_capacity(parts.len());
    for (part, _) in parts {
        let source = part.clone().try_into_primitive::<Cube>().ok()?;
        if source.dtype != DType::F32 || source.meta.strides()[..] != [1] {
            return None;
        }
        sources.push(source.into_tensor_arg());
    }
    let lengths: Vec<usize> = parts.iter().map(|(part, _)| part.dims()[0]).collect();
    let longest = lengths.iter().copied().max()?;
    let groups = longest.div_ceil(THREADS as usize * 16).clamp(1, GROUPS);
    kernel::copy::launch(
        &client,
        CubeCount::Static(groups as u32, parts.len() as u32, 1),
        CubeDim::new_1d(THREADS),
        sources.into_iter().collect(),
        target.into_tensor_arg(),
        parts.iter().map(|&(_, begin)| begin).collect(),
        lengths.into_iter().collect(),
    );
    Some(())
}

/// One number for each of several parts of a long tensor.
#[derive(Clone, Debug)]
pub struct Reduced(Tensor<1>);

impl Reduced {
    /// That of one part: `[1]`.
    pub fn get(&self, part: usize) -> Tensor<1> {
        self.0.clone().narrow(0, part * ALIGN, 1)
    }
}

/// The sum, or the mean, of each part of `whole`, in one launch; `None` where that takes another way.
///
/// # Shapes
/// - `whole`: `[any]`, f32
/// - `parts`: first element and length
pub fn reduce_parts(whole: &Tensor<1>, parts: &[(usize, usize)], mean: bool) -> Option<Reduced> {
    let device = whole.device();
    let source = whole.clone().try_into_primitive::<Cube>().ok()?;
    let client = source.client.clone();
    let hardware = &client.properties().hardware;
    if source.dtype != DType::F32
        || source.meta.strides()[..] != [1]
        || parts.len() > hardware.max_cube_count.0 as usize
        || hardware.max_units_per_cube < THREADS
    {
        return None;
    }
    let mut table = Vec::with_capacity(2 * parts.len());
    for &(first, length) in parts {
        table.extend([i32::try_from(first).ok()?, i32::try_from(length).ok()?]);
    }
    let table = TensorData::new(table, [2 * parts.len()]);
    let table = Tensor::<1, Int>::from_data(table, (&device, DType::I32));
    let results = Tensor::<1>::empty([parts.len() * ALIGN], (&device, DType::F32));
    kernel::reduce::launch(
        &client,
        CubeCount::Static(parts.len() as u32, 1, 1),
        CubeDim::new_1d(THREADS),
        source.into_tensor_arg(),
        table.try_into_primitive::<Cube>().ok()?.into_tensor_arg(),
        results
            .clone()
            .try_into_primitive::<Cube>()
            .ok()?
            .into_tensor_arg(),
        mean,
    );
    Some(Reduced(results))
}

/// What runs on the device; the macro writes functions that nobody calls by name.
#[allow(missing_docs, clippy::wildcard_imports)]
mod kernel {
    use cubecl::prelude::*;

    /// One row of workgroups for each part.
    #[cube(launch)]
    pub fn copy(
        parts: &Sequence<OwnedTensor<f32>>,
        whole: &mut Tensor<f32>,
        begins: &Sequence<usize>,
        lengths: &Sequence<usize>,
    ) {
        #[unroll]
        for part in 0..parts.len() {
            if CUBE_POS_Y as usize == part {
                let mut at = CUBE_POS_X as usize * CUBE_DIM_X as usize + UNIT_POS_X as usize;
                while at < lengths[part] {
                    whole[begins[part] + at] = parts[part].as_slice()[at];
                    at += CUBE_COUNT_X as usize * CUBE_DIM_X as usize;
                }
            }
        }
    }

    /// One workgroup for each part. A thread sums 32 elements before it adds them to the others, so that few roundings
    /// come on top of each other.
    #[cube(launch)]
    pub fn reduce(
        whole: &Tensor<f32>,
        parts: &Tensor<i32>,
        results: &mut Tensor<f32>,
        #[comptime] mean: bool,
    ) {
        let part = CUBE_POS_X as usize;
        let unit = UNIT_POS_X as usize;
        let first = parts[2 * part] as usize;
        let length = parts[2 * part + 1] as usize;
        let mut sum = 0.0f32;
        let mut at = unit;
        while at < length {
            let mut few = 0.0f32;
            let mut count = 0u32;
            while at < length && count < 32 {
                few += whole[first + at];
                at += 256;
                count += 1;
            }
            sum += few;
        }
        let mut sums = Shared::<[f32]>::new_slice(256usize);
        sums[unit] = sum;
        sync_cube();
        #[unroll]
        for step in 0..8u32 {
            let half = comptime!(128usize >> step);
            if unit < half {
                sums[unit] += sums[unit + half];
            }
            sync_cube();
        }
        if unit == 0 {
            let divisor = if mean { length } else { 1usize.runtime() };
            results[part * 256] = sums[0] / divisor as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, DeviceType};

    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|at| (at + 1000 * seed) as f32).collect()
    }

    fn put_together(device: &Device) {
        // More than one launch, one tensor that several workgroups copy more than once, one of one element.
        let lengths = [1, 300, 256, 40_000].into_iter().chain(2..60);
        let lengths: Vec<usize> = lengths.collect();
        let tensors: Vec<Tensor<1>> = lengths
            .iter()
            .enumerate()
            .map(|(seed, &own)| {
                Tensor::from_data(TensorData::new(numbers(own, seed), [own]), device)
            })
            .collect();
        let (begins, length) = places(lengths.iter().copied());
        let whole = copied_together(tensors, &begins, length).expect("tensors");
        let found = whole.try_into_vec_as::<f32>().expect("read");
        let mut expected = vec![0.0; length];
        for (seed, (&begin, &own)) in begins.iter().zip(&lengths).enumerate() {
            expected[begin..begin + own].copy_from_slice(&numbers(own, seed));
        }
        assert!(found == expected);
    }

    #[test]
    fn tensors_behind_one_another_are_what_they_were() {
        put_together(&Device::flex());
        // CI has a software Vulkan device.
        for device in Device::enumerate(DeviceType::Wgpu).into_iter().take(1) {
            put_together(&device);
        }
        assert!(together(Vec::new(), &[], 0).is_none());
    }

    #[test]
    fn parts_are_summed_in_one_launch() {
        let Some(device) = Device::enumerate(DeviceType::Wgpu).into_iter().next() else {
            return;
        };
        let values: Vec<f32> = (0..300_000)
            .map(|at| (at as f32 * 0.37).sin() + 0.2)
            .collect();
        let data = TensorData::new(values.clone(), [values.len()]);
        let whole = Tensor::<1>::from_data(data, &device);
        let parts = [(0, 1), (256, 300), (1024, 250_000), (299_000, 1000)];
        for mean in [false, true] {
            let found = reduce_parts(&whole, &parts, mean).expect("one launch");
            for (at, (first, length)) in parts.into_iter().enumerate() {
                let own = values[first..first + length].iter();
                let sum: f64 = own.map(|value| f64::from(*value)).sum();
                let expected = if mean { sum / length as f64 } else { sum };
                let found = f64::from(found.get(at).into_scalar::<f32>());
                assert!(
                    (found - expected).abs() < 1e-6 * expected.abs(),
                    "{found} {expected}"
                );
            }
        }
    }

    #[test]
    fn views_of_one_buffer_are_not_copied() {
        let Some(device) = Device::enumerate(DeviceType::Wgpu).into_iter().next() else {
            return;
        };
        let whole = Tensor::<1>::from_data(TensorData::new(numbers(1024, 0), [1024]), &device);
        let parts = [256, 512].map(|first| whole.clone().narrow(0, first, 256));
        let found = neighbours(&parts, &[0, 256], 512).expect("neighbours");
        let found = found.try_into_vec_as::<f32>().expect("read");
        assert_eq!(found, numbers(1024, 0)[256..768]);

        let swapped = [parts[1].clone(), parts[0].clone()];
        assert!(neighbours(&swapped, &[0, 256], 512).is_none());
        let beyond = neighbours(&parts, &[0, 256], 1024);
        assert!(beyond.is_none(), "beyond the buffer");
        let copied = parts.map(|part| part.add_scalar(1.0));
        assert!(neighbours(&copied, &[0, 256], 512).is_none());
    }
}
