//! Expressions against operations that are computed at once.

use burn::tensor::TensorData;
use lorasmith_sdk::testing::{CpuTensor, CpuTensors};

use super::program::Input;
use super::*;

/// Long enough for several tasks, and no multiple of a piece or a block.
const LONG: Dims = [1, 1, 3, 30_011];

fn lazy() -> LazyTensors {
    LazyTensors::new(&Device::flex())
}

fn numbers(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * 0.7 + seed).sin()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Two expressions of everything that works on elements: of a tensor, of one broadcast to it, and of a number.
fn all_operations<B: Tensors>(
    ops: &B,
    dims: Dims,
    row: Dims,
    seed: f32,
) -> Result<[B::Tensor; 2], String> {
    let elements = dims.iter().product();
    let x = ops.write(numbers(elements, seed), dims)?;
    let y = ops.write(numbers(elements, 1.0 + seed), dims)?;
    let row = ops.write(numbers(row.iter().product(), 2.0 + seed), row)?;
    let one = ops.write(vec![0.75], [1; 4])?;
    let three = ops.full([1; 4], 3.0)?;
    let mut sum = ops.binary(Binary::Mul, &x, &row, dims)?;
    for op in Binary::ALL {
        let positive = ops.scalar(Scalar::Add, &ops.unary(Unary::Abs, &y)?, 0.5)?;
        for other in [&positive, &one, &three] {
            let part = ops.binary(op, &positive, other, dims)?;
            sum = ops.binary(Binary::Add, &sum, &part, dims)?;
            let part = ops.binary(op, other, &positive, dims)?;
            sum = ops.binary(Binary::Sub, &sum, &part, dims)?;
        }
    }
    let mut product = ops.clamp(&x, -0.3, 0.6)?;
    for op in Unary::ALL {
        let positive = ops.scalar(Scalar::Add, &ops.unary(Unary::Square, &y)?, 0.25)?;
        let part = ops.unary(op, &positive)?;
        product = ops.binary(Binary::Add, &product, &part, dims)?;
    }
    for op in Scalar::ALL {
        let positive = ops.scalar(Scalar::Add, &ops.unary(Unary::Abs, &x)?, 0.5)?;
        let part = ops.scalar(op, &positive, 1.7)?;
        product = ops.binary(Binary::Add, &product, &part, dims)?;
    }
    let condition = ops.scalar(Scalar::Greater, &sum, 0.0)?;
    let chosen = ops.select(&condition, &product, &row, dims)?;
    Ok([sum, chosen])
}

fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (index, (a, b)) in found.iter().zip(expected).enumerate() {
        // Powers, exponentials and logarithms may differ in the last bits, of which some sums are made.
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{index}: {a} {b}");
    }
}

#[test]
fn expressions_are_the_operations_of_the_test_host() {
    for (dims, row) in [
        ([1, 2, 3, 5], [1, 1, 1, 5]),
        ([1, 2, 3, 5], [1, 1, 3, 1]),
        ([2, 2, 1, 7], [2, 1, 1, 1]),
        (LONG, [1, 1, 1, 30_011]),
        ([1; 4], [1; 4]),
    ] {
        let tensors = lazy();
        let found = all_operations(&tensors, dims, row, 0.1).expect("expressions");
        let expected: [CpuTensor; 2] =
            all_operations(&CpuTensors, dims, row, 0.1).expect("tensors");
        for (found, expected) in found.iter().zip(&expected) {
            close(&tensors.read(found).expect("read"), expected.values());
        }
    }
}

/// CI has a software Vulkan device.
fn gpu() -> Option<LazyTensors> {
    let device = Device::enumerate(burn::tensor::DeviceType::Wgpu);
    device.first().map(LazyTensors::new)
}

fn in_one_kernel(tensors: &LazyTensors, job: &Job) -> Vec<Data> {
    let inputs = job.inputs.iter().map(|input| match input {
        Input::Tensor(tensor) => Data::Values(tensors.value(tensor).expect("there")),
        Input::Codes(blocks) => Data::Codes(blocks.clone()),
    });
    let inputs: Vec<Data> = inputs.collect();
    let made = fused::run(&job.program, &inputs, job.dims).expect("one kernel");
    made.into_iter().map(|(_, made)| made).collect()
}

/// Whole blocks, a last one that is not whole, and blocks of zeros.
#[test]
fn one_kernel_reads_and_writes_codes() {
    let Some(tensors) = gpu() else { return };
    for (code, elements) in [
        (Code::Signed, 2048),
        (Code::Unsigned, 70_001),
        (Code::Signed, 3),
    ] {
        let dims = [1, 1, 1, elements];
        let mut values: Vec<f32> = (numbers(elements, 0.3).into_iter().enumerate())
            .map(|(at, value)| value * 10_f32.powi(at as i32 % 7 - 5))
            .map(|value| {
                if code == Code::Unsigned {
                    value.abs()
                } else {
                    value
                }
            })
            .collect();
        let zeros = (elements / 2).min(512);
        values[..zeros].fill(0.0);
        let quantized = code.quantize(&values);
        let blocks = LazyBlocks::ready(tensors.eager.write_blocks(quantized.clone()), code);
        let decoded = tensors.dequantize(&blocks, code, dims).expect("values");
        let twice = tensors
            .scalar(Scalar::Mul, &decoded, 2.0)
            .expect("expression");
        let roots = [Root::Values(twice.clone()), Root::Codes(twice, code)];
        let job = compile(&tensors, &roots).expect("a program");
        let [Data::Values(found), Data::Codes(codes)] = &in_one_kernel(&tensors, &job)[..] else {
            panic!("values and codes");
        };
        let expected: Vec<f32> = code
            .dequantize(&quantized)
            .into_iter()
            .map(|value| 2.0 * value)
            .collect();
        assert_eq!(tensors.eager.read(found).expect("read"), expected);
        let found = codes.read().expect("codes");
        let expected = code.quantize(&expected);
        assert_eq!(found.absmax, expected.absmax);
        // Division on a device may be off in the last bit: a value at a midpoint may go to either side.
        let off = found
            .codes
            .iter()
            .zip(&expected.codes)
            .map(|(a, b)| a.abs_diff(*b));
        assert!(off.max().unwrap_or(0) <= 1 && found.codes.len() == elements);
    }
}

#[test]
fn one_kernel_does_all_operations() {
    let Some(tensors) = gpu() else { return };
    for (dims, row) in [
        ([1, 2, 3, 5], [1, 1, 1, 5]),
        ([2, 2, 1, 7], [2, 1, 1, 1]),
        ([1, 1, 3, 30_011], [1; 4]),
    ] {
        let found = all_operations(&tensors, dims, row, 0.1).expect("expressions");
        let expected: [CpuTensor; 2] =
            all_operations(&CpuTensors, dims, row, 0.1).expect("tensors");
        for (found, expected) in found.iter().zip(&expected) {
            let job = compile(&tensors, &[Root::Values(found.clone())]).expect("a program");
            let [Data::Values(made)] = &in_one_kernel(&tensors, &job)[..] else {
                panic!("values");
            };
            close(&tensors.eager.read(made).expect("read"), expected.values());
        }
    }
}

/// Plugins square by powers, and what they square may be negative.
#[test]
fn whole_powers_of_negative_numbers_are_numbers() {
    for tensors in gpu().into_iter().chain([lazy()]) {
        let dims = [1, 1, 1, 3];
        let values = vec![-2.0, -0.5, 3.0_f32];
        let x = tensors.write(values.clone(), dims).expect("a tensor");
        for exponent in [0, 1, 2, 3, -1, -2] {
            let expected: Vec<f32> = values.iter().map(|value| value.powi(exponent)).collect();
            let by_number = tensors.scalar(Scalar::Pow, &x, f64::from(exponent));
            close(
                &tensors.read(&by_number.expect("expression")).expect("read"),
                &expected,
            );
            let exponents = tensors
                .write(vec![exponent as f32; 3], dims)
                .expect("a tensor");
            let by_tensor = tensors.binary(Binary::Pow, &x, &exponents, dims);
            close(
                &tensors.read(&by_tensor.expect("expression")).expect("read"),
                &expected,
            );
        }
    }
}

/// More of them than a kernel has buffers, each needed for the next.
#[test]
fn reductions_wait_for_each_other() {
    for tensors in gpu().into_iter().chain([lazy()]) {
        let dims = [1, 1, 3, 50];
        let mut total = tensors.full([1; 4], 0.0).expect("zero");
        let mut expected = 0.0;
        let (mut largest, mut maxima) = (Vec::new(), Vec::new());
        for seed in 0..200 {
            let values = numbers(150, seed as f32);
            let sum: f32 = values.iter().map(|value| value * value).sum();
            expected += sum + values.iter().sum::<f32>() / 150.0;
            largest.push(values.iter().fold(0.0_f32, |max, value| max.max(*value)));
            let x = tensors.write(values, dims).expect("a tensor");
            let square = tensors.unary(Unary::Square, &x).expect("expression");
            for part in [
                tensors.reduce(Reduce::Sum, &square, None),
                tensors.reduce(Reduce::Mean, &x, None),
            ] {
                let part = part.expect("a number");
                total = tensors
                    .binary(Binary::Add, &total, &part, [1; 4])
                    .expect("a sum");
            }
            maxima.push(tensors.reduce(Reduce::Max, &x, None).expect("a number"));
        }
        let found = tensors.read(&total).expect("read")[0];
        assert!(
            (found - expected).abs() < 1e-5 * expected,
            "{found} {expected}"
        );
        let read = |max: LazyTensor| tensors.read(&max).expect("read")[0];
        assert_eq!(maxima.into_iter().map(read).collect::<Vec<f32>>(), largest);
        // One that needs another one that waits.
        let x = tensors.write(numbers(150, 0.0), dims).expect("a tensor");
        let mean = tensors.reduce(Reduce::Mean, &x, None).expect("a number");
        let centred = tensors
            .binary(Binary::Sub, &x, &mean, dims)
            .expect("expression");
        let rest = tensors
            .reduce(Reduce::Sum, &centred, None)
            .expect("a number");
        assert!(tensors.read(&rest).expect("read")[0].abs() < 1e-4);
    }
}

#[test]
fn a_kernel_reads_views_where_they_are() {
    let Some(tensors) = gpu() else { return };
    let x = tensors
        .write(numbers(35, 0.0), [1, 1, 5, 7])
        .expect("a tensor");
    let turned = tensors.swap_axes(&x, 2, 3).expect("a view");
    let twice = tensors
        .scalar(Scalar::ReverseSub, &turned, 3.0)
        .expect("expression");
    let found = tensors.read(&twice).expect("read");
    let expected = (0..35).map(|at| 3.0 - numbers(35, 0.0)[at % 5 * 7 + at / 5]);
    close(&found, &expected.collect::<Vec<f32>>());
}

/// Other devices put tensors together; the same is done here on the CPU's backend.
#[test]
fn tensors_that_are_put_together_are_as_they_are_alone() {
    let tensors = lazy();
    let shapes = [[1, 1, 3, 5], [1, 1, 2, 700], [1, 1, 3, 5]];
    let mut bundles = Vec::new();
    let one = tensors.write(vec![1.25], [1; 4]).expect("a number");
    for (seed, dims) in shapes.into_iter().enumerate() {
        let [sum, chosen] =
            all_operations(&tensors, dims, [1; 4], seed as f32).expect("expressions");
        let shared = tensors.binary(Binary::Mul, &sum, &one, dims);
        bundles.push(vec![
            Root::Values(shared.expect("expression")),
            Root::Values(chosen),
        ]);
    }
    let jobs: Result<Vec<Job>, String> = bundles
        .iter()
        .map(|roots| compile(&tensors, roots))
        .collect();
    let jobs = jobs.expect("programs");
    let together = device::run(&tensors.eager, &jobs).expect("computed");
    let apart = cpu::run(&jobs).expect("computed");
    for (together, apart) in together.into_iter().zip(apart) {
        for (together, apart) in together.into_iter().zip(apart) {
            let read = |made: Made| {
                let values = made.values().expect("values");
                tensors.read(&values).expect("read")
            };
            close(&read(together), &read(apart));
        }
    }
}

#[test]
fn what_was_put_together_is_not_copied_again() {
    let tensors = lazy();
    let whole = Arc::new(Tensor::<1>::from_data(
        TensorData::new(numbers(1024, 0.0), [1024]),
        &Device::flex(),
    ));
    let dims = [1, 1, 3, 100];
    let bundles: Vec<Vec<Root>> = [0, 512]
        .map(|first| {
            let part = LazyTensor::part(&whole, first, dims);
            let twice = tensors.scalar(Scalar::Mul, &part, 2.0).expect("expression");
            vec![Root::Values(twice)]
        })
        .into();
    let jobs: Vec<Job> = bundles
        .iter()
        .map(|roots| compile(&tensors, roots).expect("a program"))
        .collect();
    let made = device::run(&tensors.eager, &jobs).expect("computed");
    for (first, made) in [0, 512].into_iter().zip(made) {
        let values = made.into_iter().next().and_then(Made::values);
        let found = tensors.read(&values.expect("values")).expect("read");
        let expected: Vec<f32> = numbers(1024, 0.0)[first..first + 300]
            .iter()
            .map(|value| value * 2.0)
            .collect();
        assert_eq!(found, expected);
    }
}

/// The bits do not depend on how many threads there are, nor on what else is computed.
#[test]
fn threads_and_company_change_no_bit() {
    let compute = |threads: usize, others: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.expect("threads").install(|| {
            let tensors = lazy();
            let bundles: Vec<Vec<Root>> = (0..=others)
                .map(|seed| {
                    let row = [1, 1, 1, 30_011];
                    let [sum, chosen] =
                        all_operations(&tensors, LONG, row, seed as f32).expect("expressions");
                    vec![Root::Values(sum), Root::Codes(chosen, Code::Signed)]
                })
                .collect();
            let mut made = tensors.compute(&bundles).expect("computed");
            let mut first = made.swap_remove(0).into_iter();
            let values = first.next().and_then(Made::values).expect("values");
            let codes = first.next().and_then(Made::codes).expect("codes");
            (
                bits(&tensors.read(&values).expect("read")),
                codes.read().expect("read"),
            )
        })
    };
    let alone = compute(1, 0);
    assert_eq!(compute(3, 0), alone);
    assert_eq!(compute(2, 2), alone);
}

#[test]
fn codes_are_those_of_the_whole_tensor() {
    let tensors = lazy();
    let values = numbers(LONG.iter().product(), 0.0);
    let x = tensors.write(values.clone(), LONG).expect("a tensor");
    let half = tensors.scalar(Scalar::Mul, &x, 0.5).expect("expression");
    let blocks = tensors.quantize(&half, Code::Signed).expect("codes");
    let halves: Vec<f32> = values.iter().map(|value| value * 0.5).collect();
    let expected = Code::Signed.quantize(&halves);
    let found = tensors.codes(&blocks).expect("computed");
    assert_eq!(found.read().expect("read"), expected);
    let back = tensors.dequantize(&blocks, Code::Signed, LONG);
    let back = tensors.scalar(Scalar::Add, &back.expect("values"), 0.0);
    let back = tensors.read(&back.expect("expression")).expect("read");
    assert_eq!(bits(&back), bits(&Code::Signed.dequantize(&expected)));
}

#[test]
fn a_long_chain_is_computed_on_the_way() {
    let tensors = lazy();
    let mut x = tensors.full([1, 1, 1, 3], 0.0).expect("zeros");
    for _ in 0..100_000 {
        x = tensors.scalar(Scalar::Add, &x, 1.0).expect("expression");
    }
    assert_eq!(tensors.read(&x).expect("read"), [100_000.0; 3]);
}

#[test]
fn not_a_number_goes_through() {
    goes_through(&lazy());
    if let Some(tensors) = gpu() {
        goes_through(&tensors);
    }
}

fn goes_through(tensors: &LazyTensors) {
    let dims = [1, 1, 1, 3];
    let x = tensors
        .write(vec![f32::NAN, -2.0, 2.0], dims)
        .expect("a tensor");
    let zero = tensors.full(dims, 0.0).expect("zeros");
    let read = |x: Result<LazyTensor, String>| tensors.read(&x.expect("done")).expect("read");
    for (a, b) in [(&x, &zero), (&zero, &x)] {
        assert!(read(tensors.binary(Binary::Max, a, b, dims))[0].is_nan());
        assert!(read(tensors.binary(Binary::Min, a, b, dims))[0].is_nan());
    }
    assert!(read(tensors.clamp(&x, -1.0, 1.0))[0].is_nan());
    assert_eq!(read(tensors.clamp(&x, -1.0, 1.0))[1..], [-1.0, 1.0]);
    assert_eq!(read(tensors.unary(Unary::Sign, &x)), [0.0, -1.0, 1.0]);
}
