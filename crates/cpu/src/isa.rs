//! Instruction sets: which the processor has and which one is in use.

use std::{fmt, str::FromStr};

use lawson_core::{Error, ErrorKind, Result};

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on any processor.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with AVX-VNNI: int8 is multiplied in bytes.
    Avx2Vnni,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI: int8 is multiplied in bytes.
    Avx512Vnni,
    /// AVX-512 with VNNI and BF16: bf16 is multiplied in pairs.
    Avx512Bf16,
    /// AVX-512 with VNNI, BF16 and AMX: bf16 is multiplied in tiles.
    Amx,
    /// AArch64 with Advanced SIMD, which includes f16 conversion.
    Neon,
    /// Advanced SIMD with BF16: bf16 is multiplied in matrices of 2 × 4.
    NeonBf16,
}

impl Isa {
    /// Every instruction set, narrowest first.
    pub const ALL: [Isa; 9] = [
        Isa::Portable,
        Isa::Avx2,
        Isa::Avx2Vnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Avx512Bf16,
        Isa::Amx,
        Isa::Neon,
        Isa::NeonBf16,
    ];

    /// The name users write.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx2Vnni => "avx2_vnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512_vnni",
            Isa::Avx512Bf16 => "avx512_bf16",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
            Isa::NeonBf16 => "neon_bf16",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Vnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512Vnni.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512Bf16.is_available() && crate::simd::amx::is_available(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16 => Isa::Neon.is_available() && std::arch::is_aarch64_feature_detected!("bf16"),
            _ => false,
        }
    }

    /// Whether [`Isa::choose`] may take it: it is no slower than narrower ones.
    fn is_worthwhile(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Isa::Avx512Bf16 {
            return crate::simd::avx512::pairs_are_fast();
        }
        true
    }

    /// Every instruction set this processor has, narrowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|i| i.is_available()).collect()
    }

    /// The fastest one this processor has, or the one that the environment variable `LAWSON_ISA` names.
    ///
    /// # Errors
    /// `InvalidInput` for an unknown name, `Unavailable` for one that this processor lacks.
    pub fn choose() -> Result<Isa> {
        match std::env::var("LAWSON_ISA") {
            Ok(name) if !name.is_empty() => {
                let isa: Isa = name.parse().map_err(|e: Error| e.at("LAWSON_ISA"))?;
                if isa.is_available() {
                    return Ok(isa);
                }
                let has: Vec<_> = Isa::available().iter().map(|i| i.name()).collect();
                Err(Error::new(
                    ErrorKind::Unavailable,
                    format!("LAWSON_ISA: this processor lacks {isa}; it has {}", has.join(", ")),
                ))
            }
            _ => Ok(Isa::available().into_iter().rfind(|i| i.is_worthwhile()).unwrap_or(Isa::Portable)),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let found = Isa::ALL.into_iter().find(|i| i.name() == s);
        found.ok_or_else(|| {
            let names: Vec<_> = Isa::ALL.iter().map(|i| i.name()).collect();
            Error::invalid(format!("unknown instruction set '{s}'; accepted: {}", names.join(", ")))
        })
    }
}
