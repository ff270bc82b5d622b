//! The instruction sets of this machine, found at run time: one binary serves all.

use std::sync::OnceLock;

/// The environment's word on the best instruction set that is used: for comparisons, and to get equal numbers from
/// different machines.
pub const OVERRIDE: &str = "LORASMITH_INSTRUCTIONS";

/// What products are computed with, from the least to the most able.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the target's baseline has, and the compiler makes of it.
    Portable,
    /// 256 bits with fused multiply-add.
    Avx2,
    /// 512 bits.
    Avx512,
    /// Tiles of bf16.
    Amx,
}

impl Level {
    /// All of them.
    const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// The name in answers and in [`OVERRIDE`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// The best that the machine has and [`OVERRIDE`] allows.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| {
            let most = std::env::var(OVERRIDE)
                .ok()
                .and_then(|name| Self::ALL.into_iter().find(|level| level.name() == name))
                .unwrap_or(Self::Amx);
            let found = |level: &Self| *level <= most && level.is_there();
            Self::ALL
                .into_iter()
                .rev()
                .find(found)
                .unwrap_or(Self::Portable)
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn is_there(self) -> bool {
        let avx2 = || std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
        let avx512 = || {
            std::is_x86_feature_detected!("avx512f")
                && std::is_x86_feature_detected!("avx512bw")
                && std::is_x86_feature_detected!("avx512vl")
                && std::is_x86_feature_detected!("avx512dq")
        };
        match self {
            Self::Portable => true,
            Self::Avx2 => avx2(),
            Self::Avx512 => avx2() && avx512(),
            Self::Amx => avx2() && avx512() && super::amx::is_there(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_there(self) -> bool {
        self == Self::Portable
    }
}
