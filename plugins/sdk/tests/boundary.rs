//! The operation table called as a careless plugin would: dead handles, null and misaligned pointers, wrong ranks, kinds
//! and lengths, in many orders. `tests/sanitize.sh` runs this under AddressSanitizer.
#![expect(unsafe_code, reason = "calls the operation table as a plugin does")]

use std::ptr::null_mut;

use lorasmith_abi::host::{HostParam, Session, States, StepInput};
use lorasmith_abi::{
    BAD_ARGUMENT, BinaryFn, GLOBAL, Handle, LsHost, LsParam, LsStep, LsStr, OK, ReduceFn, ScalarFn,
    Status, UnaryFn,
};
use lorasmith_sdk::testing::{CpuTensor, CpuTensors};

const STEPS: u64 = 20_000;
/// Most calls of a step.
const CALLS: usize = 24;

/// A generator of numbers, good enough to vary arguments (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, count: usize) -> usize {
        (self.roll() % count as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// A step as a plugin sees it.
struct Careless<'a> {
    dice: &'a mut Dice,
    host: &'a LsHost,
    params: &'a [LsParam],
    known: Vec<Handle>,
    /// Room for results, with a byte before it to point wrongly at.
    room: Box<[u64; 65]>,
}

impl Careless<'_> {
    /// Mostly a live tensor.
    fn tensor(&mut self) -> Handle {
        if self.dice.one_in(60) {
            return [0, 1, u64::MAX, self.dice.roll()][self.dice.below(4)];
        }
        self.known[self.dice.below(self.known.len())]
    }

    fn number(&mut self) -> f64 {
        [0.0, -1.0, 0.5, 2.0, 1e300, f64::NAN, f64::INFINITY][self.dice.below(7)]
    }

    fn axis(&mut self) -> i32 {
        [0, 1, -1, -2, i32::MIN, i32::MAX, 4][self.dice.below(7)]
    }

    fn param(&mut self) -> u32 {
        if self.dice.one_in(40) {
            return [GLOBAL, 12345][self.dice.below(2)];
        }
        self.params[self.dice.below(self.params.len())].id
    }

    fn name(&mut self) -> LsStr {
        const BYTES: &[u8] = b"ab\xFF";
        match self.dice.below(60) {
            0 => LsStr {
                ptr: std::ptr::null(),
                len: 3,
            },
            1 => LsStr {
                ptr: BYTES.as_ptr(),
                len: 3,
            },
            2 => LsStr {
                ptr: BYTES.as_ptr(),
                len: 0,
            },
            3 => LsStr {
                ptr: BYTES.as_ptr(),
                len: u64::MAX,
            },
            4..30 => LsStr {
                ptr: BYTES.as_ptr(),
                len: 1,
            },
            _ => LsStr {
                ptr: BYTES.as_ptr(),
                len: 2,
            },
        }
    }

    /// Where a result goes: seldom nowhere, or between two places.
    fn out<T>(&mut self) -> *mut T {
        let room = self.room.as_mut_ptr();
        match self.dice.below(80) {
            0 => null_mut(),
            1 => room.cast::<u8>().wrapping_add(1).cast(),
            _ => room.cast(),
        }
    }

    fn shape(&mut self) -> (Vec<u64>, u32) {
        let rank = self.dice.below(6);
        let dims: Vec<u64> = (0..rank)
            .map(|_| {
                [1, 2, 3, 6, 0, u64::MAX][self.dice.below(if self.dice.0.is_multiple_of(9) {
                    6
                } else {
                    4
                })]
            })
            .collect();
        (dims, rank as u32)
    }

    fn call(&mut self) -> Status {
        let (host, ctx) = (self.host, self.host.ctx);
        let binary: [BinaryFn; 10] = [
            host.add,
            host.sub,
            host.mul,
            host.div,
            host.pow,
            host.min,
            host.max,
            host.greater,
            host.matmul,
            host.dot,
        ];
        let scalar: [ScalarFn; 8] = [
            host.add_scalar,
            host.sub_scalar,
            host.rsub_scalar,
            host.mul_scalar,
            host.div_scalar,
            host.rdiv_scalar,
            host.pow_scalar,
            host.greater_scalar,
        ];
        let unary: [UnaryFn; 9] = [
            host.neg,
            host.abs,
            host.sign,
            host.sqrt,
            host.rsqrt,
            host.square,
            host.exp,
            host.log,
            host.norm,
        ];
        let reduce: [ReduceFn; 3] = [host.sum, host.mean, host.max_axis];
        let (a, b, c) = (self.tensor(), self.tensor(), self.tensor());
        let (x, y) = (self.number(), self.number());
        let (axis, other_axis) = (self.axis(), self.axis());
        let (param, name) = (self.param(), self.name());
        let (dims, rank) = self.shape();
        let shape = if self.dice.one_in(40) {
            std::ptr::null()
        } else {
            dims.as_ptr()
        };
        let made: *mut Handle = self.out();
        let kind = self.dice.below(6) as u32;
        let length = [0, 1, 6, 7][self.dice.below(4)];
        let (data, at) = ([0.5_f32; 8], self.dice.below(24));
        // SAFETY: pointers are null, misaligned, or good for as many values as is said; the host checks the rest.
        let (status, makes) = unsafe {
            match at {
                0..4 => (binary[self.dice.below(10)](ctx, a, b, made), true),
                4..7 => (scalar[self.dice.below(8)](ctx, a, x, made), true),
                7..10 => (unary[self.dice.below(9)](ctx, a, made), true),
                10 => (reduce[self.dice.below(3)](ctx, a, axis, made), true),
                11 => ((host.clamp)(ctx, a, x, y, made), true),
                12 => ((host.where_)(ctx, a, b, c, made), true),
                13 => ((host.lerp)(ctx, a, b, x, made), true),
                14 => ((host.transpose)(ctx, a, axis, other_axis, made), true),
                15 => ((host.reshape)(ctx, a, shape, rank, made), true),
                16 => ((host.full)(ctx, shape, rank, x, made), true),
                17 => (
                    (host.write)(ctx, data.as_ptr(), length, shape, rank, made),
                    true,
                ),
                18 => (
                    (host.state)(ctx, param, name, kind, shape, rank, made),
                    true,
                ),
                19 => ((host.assign_state)(ctx, param, name, a), false),
                20 => ((host.assign)(ctx, param, a), false),
                21 => ((host.counter)(ctx, param, name, self.out()), false),
                22 => ((host.read)(ctx, a, self.out(), length), false),
                _ if self.dice.one_in(6) => ((host.release)(ctx, a), false),
                _ => ((host.read_scalar)(ctx, a, self.out()), false),
            }
        };
        if makes && status == OK {
            // SAFETY: an operation that is done has written its handle there.
            self.known.push(unsafe { made.read() });
        }
        status
    }
}

#[test]
fn careless_calls_are_refused_and_leave_everything_as_it_was() {
    let mut dice = Dice(7);
    let mut states = States::<CpuTensors>::default();
    let shapes: [&[usize]; 3] = [&[2, 3], &[6], &[1, 1, 2, 3]];
    let mut outcomes = [0_u64; 9];
    let mut finished = 0;
    for step in 0..STEPS {
        let params = shapes.iter().zip(["a", "b", "c"]).enumerate();
        let params = params.map(|(id, (shape, name))| {
            let dims = if shape.len() == 1 {
                [1, 1, 1, 6]
            } else {
                [1, 1, 2, 3]
            };
            let tensor = || CpuTensor::new(vec![0.25; 6], dims).expect("a tensor");
            HostParam {
                id: id as u32,
                name,
                shape,
                value: tensor(),
                grad: Some(tensor()),
                lr: 0.1,
                weight_decay: true,
            }
        });
        let input = StepInput {
            step,
            params: params.collect(),
        };
        let before = states.iter().count();
        let outcome = Session::run(CpuTensors, input, &mut states, |host, now| {
            // SAFETY: the session keeps both alive during the call, and the parameters as long.
            let (host, params) = unsafe { (&*host, params_of(&*now)) };
            let known = params.iter().flat_map(|param| [param.value, param.grad]);
            let mut plugin = Careless {
                dice: &mut dice,
                host,
                params,
                known: known.collect(),
                room: Box::new([0; 65]),
            };
            let mut last = OK;
            for _ in 0..=plugin.dice.below(CALLS) {
                let status = plugin.call();
                outcomes[status as usize] += 1;
                if last != OK {
                    assert_ne!(status, OK, "an operation after one that has failed");
                }
                if status != OK {
                    last = status;
                }
            }
            // The failure is the host's to remember.
            OK
        });
        match outcome {
            Ok(values) => {
                finished += 1;
                assert_eq!(values.len(), shapes.len());
            }
            Err(message) => {
                assert!(!message.is_empty());
                assert_eq!(states.iter().count(), before, "{message}");
            }
        }
    }
    // Every kind of refusal was met, and whole steps, too.
    assert!(finished > 100, "{finished} of {STEPS}");
    for status in [OK, 2, 3, BAD_ARGUMENT] {
        assert!(outcomes[status as usize] > 100, "{outcomes:?}");
    }
    assert_eq!(outcomes[7], 0, "a panic behind the boundary");
}

/// # Safety
/// The step is one that the host has made.
unsafe fn params_of(step: &LsStep) -> &[LsParam] {
    assert_eq!(step.param_size as usize, size_of::<LsParam>());
    // SAFETY: the host's parameters lie behind one another.
    unsafe { std::slice::from_raw_parts(step.params, step.param_count as usize) }
}
