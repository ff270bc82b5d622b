//! Products of bf16 tiles on Intel's matrix unit (AMX), which sums in f32.
//!
//! A tile is 16 rows of 64 bytes. The left side's rows are lanes with 32 depths each, the right side's rows are pairs
//! of depths with 16 lanes each (Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20). An f32
//! is up to three bf16 [parts](super::parts), and a product of f32 a sum of products of their parts.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::parts::{Count, LANES, PartPanels, STEP};
use super::tile::Into;

/// `ARCH_REQ_XCOMP_PERM` of `arch_prctl(2)`.
const REQUEST_PERMISSION: i32 = 0x1023;
/// The state component of tile data (`XFEATURE_XTILEDATA`).
const TILE_DATA: i32 = 18;

/// Whether this machine multiplies bf16 tiles, and the system lets us.
pub fn is_there() -> bool {
    static IS_THERE: OnceLock<bool> = OnceLock::new();
    *IS_THERE.get_or_init(|| has_instructions() && is_permitted())
}

fn has_instructions() -> bool {
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES
}

/// Linux saves tile registers for those alone who have asked; elsewhere nobody has tried.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    // SAFETY: the call takes two integers, and gives this process a right.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// The tile registers of this thread, from now until it is dropped, for sides in so many parts.
pub struct Tiles {
    full: Kernel,
    half: Kernel,
    step_bytes: [usize; 2],
}

#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// Eight full tiles.
    pub fn configure(parts: [Count; 2]) -> Self {
        static SHAPES: Shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        assert!(is_there());
        // SAFETY: the instruction is there, and reads 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly)) };
        let [full, half] = kernels_of(parts);
        Self {
            full,
            half,
            step_bytes: parts.map(|parts| PartPanels::panel(STEP, parts) * size_of::<u16>()),
        }
    }

    /// Computes one tile of a product.
    ///
    /// # Safety
    /// As [`TileProduct`] says of its pointers.
    pub unsafe fn multiply(&self, product: &TileProduct) {
        // SAFETY: the caller's promise, and the tiles are configured.
        unsafe {
            let kernel = if product.half { self.half } else { self.full };
            kernel(product, self.step_bytes[0], self.step_bytes[1]);
        }
    }
}

/// `c[r][j] = Σ a[r][d] · b[d][j]`, or `+=`, for 32 rows and 32 columns.
#[derive(Clone, Copy)]
pub struct TileProduct {
    /// Steps of depth.
    pub steps: usize,
    /// A panel of so many steps.
    pub a: *const u16,
    /// A panel of so many steps.
    pub b: *const u16,
    /// 32 rows of 32 values (16, where `half` says so) that are `ldc` apart.
    pub c: *mut f32,
    /// Distance of the rows.
    pub ldc: usize,
    /// What becomes of the values that are there.
    pub into: Into,
    /// Whether the first 16 columns are all.
    pub half: bool,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: nobody else of this thread uses them.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

type Kernel = unsafe fn(&TileProduct, usize, usize);

/// The products of parts `i` and `j` with `i + j` up to the larger side's last index: what is left out is below half a
/// unit in the last place of the whole.
fn kernels_of(parts: [Count; 2]) -> [Kernel; 2] {
    use Count::{One, Three, Two};
    match parts {
        [One, One] => kernels::one_one(),
        [One, Two] => kernels::one_two(),
        [Two, One] => kernels::two_one(),
        [One, Three] => kernels::one_three(),
        [Three, One] => kernels::three_one(),
        [Two, Two] => kernels::two_two(),
        [Two, Three] => kernels::two_three(),
        [Three, Two] => kernels::three_two(),
        [Three, Three] => kernels::three_three(),
    }
}

mod kernels {
    use super::{Into, Kernel, LANES, TileProduct, asm};

    /// Both halves of part `i` of the left side.
    macro_rules! left {
        ($part:literal) => {
            concat!(
                "tileloadd tmm4, [{a} + {row} + 2048*",
                $part,
                "]\n",
                "tileloadd tmm5, [{a} + {row} + 2048*",
                $part,
                " + 1024]\n",
            )
        };
    }
    /// Both halves of part `j` of the right side, or the first.
    macro_rules! right {
        (full $part:literal) => {
            concat!(
                "tileloadd tmm6, [{b} + {row} + 2048*",
                $part,
                "]\n",
                "tileloadd tmm7, [{b} + {row} + 2048*",
                $part,
                " + 1024]\n",
            )
        };
        (half $part:literal) => {
            concat!("tileloadd tmm6, [{b} + {row} + 2048*", $part, "]\n")
        };
    }
    /// What is loaded of the left side by what is loaded of the right one.
    macro_rules! multiply {
        (full) => {
            "tdpbf16ps tmm0, tmm4, tmm6\n\
             tdpbf16ps tmm1, tmm4, tmm7\n\
             tdpbf16ps tmm2, tmm5, tmm6\n\
             tdpbf16ps tmm3, tmm5, tmm7\n"
        };
        (half) => {
            "tdpbf16ps tmm0, tmm4, tmm6\n\
             tdpbf16ps tmm2, tmm5, tmm6\n"
        };
    }
    /// Reads, clears or writes the sums.
    macro_rules! sums {
        (read full) => {
            "tileloadd tmm0, [{c} + {ldc}]\n\
             tileloadd tmm1, [{c} + {ldc} + 64]\n\
             tileloadd tmm2, [{low} + {ldc}]\n\
             tileloadd tmm3, [{low} + {ldc} + 64]\n"
        };
        (read half) => {
            "tileloadd tmm0, [{c} + {ldc}]\n\
             tileloadd tmm2, [{low} + {ldc}]\n"
        };
        (clear) => {
            "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3\n"
        };
        (write full) => {
            "tilestored [{c} + {ldc}], tmm0\n\
             tilestored [{c} + {ldc} + 64], tmm1\n\
             tilestored [{low} + {ldc}], tmm2\n\
             tilestored [{low} + {ldc} + 64], tmm3\n"
        };
        (write half) => {
            "tilestored [{c} + {ldc}], tmm0\n\
             tilestored [{low} + {ldc}], tmm2\n"
        };
    }
    /// A walk over pairs of parts that changes one side at a time. The smallest products come first where the walk
    /// allows it.
    macro_rules! walk {
        ($width:ident [$($side:ident $part:literal),*]) => {
            concat!($(walk!(@$side $width $part)),*)
        };
        (@a $width:ident $part:literal) => { concat!(left!($part), multiply!($width)) };
        (@b $width:ident $part:literal) => { concat!(right!($width $part), multiply!($width)) };
        // Loaded only: its product comes with the next.
        (@first $width:ident $part:literal) => { left!($part) };
    }
    macro_rules! kernel {
        ($name:ident, $width:ident, $walk:tt) => {
            unsafe fn $name(product: &TileProduct, a_step: usize, b_step: usize) {
                let TileProduct {
                    steps,
                    a,
                    b,
                    c,
                    ldc,
                    into,
                    ..
                } = *product;
                let ldc = ldc * size_of::<f32>();
                let present = usize::from(into == Into::Present);
                // SAFETY: the caller of `Tiles::multiply` has promised the panels and `c`; the tiles are configured.
                unsafe {
                    asm!(
                        "test {present}, {present}",
                        "jz 3f",
                        sums!(read $width),
                        "jmp 2f",
                        "3:",
                        sums!(clear),
                        "2:",
                        walk!($width $walk),
                        "add {a}, {a_step}",
                        "add {b}, {b_step}",
                        "dec {steps}",
                        "jnz 2b",
                        sums!(write $width),
                        present = in(reg) present,
                        steps = inout(reg) steps => _,
                        a = inout(reg) a => _,
                        b = inout(reg) b => _,
                        a_step = in(reg) a_step,
                        b_step = in(reg) b_step,
                        c = in(reg) c,
                        low = in(reg) c.byte_add(LANES / 2 * ldc),
                        ldc = in(reg) ldc,
                        row = in(reg) 64_usize,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack),
                    );
                }
            }
        };
    }
    /// One walk at both widths.
    macro_rules! pair {
        ($name:ident, $walk:tt) => {
            pub fn $name() -> [Kernel; 2] {
                kernel!(full, full, $walk);
                kernel!(half, half, $walk);
                [full, half]
            }
        };
    }
    pair!(one_one, [first 0, b 0]);
    pair!(one_two, [first 0, b 1, b 0]);
    pair!(two_one, [first 1, b 0, a 0]);
    pair!(one_three, [first 0, b 2, b 1, b 0]);
    pair!(three_one, [first 2, b 0, a 1, a 0]);
    pair!(two_two, [first 0, b 1, b 0, a 1]);
    pair!(two_three, [first 0, b 2, b 1, a 1, b 0, a 0]);
    pair!(three_two, [first 0, b 1, a 1, b 0, a 2, a 0]);
    pair!(three_three, [first 0, b 2, b 1, a 1, b 0, a 2, a 0]);
}
