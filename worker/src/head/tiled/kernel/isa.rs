//! Which vector instructions this machine has, and how code is compiled for them. Owns the proof that a machine that
//! lacks an instruction never meets it; knows no tensor and no head.
//!
//! It needs `unsafe` because calling a function compiled for more than the baseline is only sound where the machine
//! has it.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::gemm::{self, Format};
use std::sync::OnceLock;
use tracing::warn;

/// The variable that names the instructions of the head, as `arcface-worker bench head` prints them; for comparisons, and for trouble.
const CHOICE: &str = "ARCFACE_HEAD_INSTRUCTIONS";

/// Instructions to compute with. Values exist only for what the machine has ([`Isa::best`], [`Isa::all`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa {
    level: Level,
    /// Products of bf16 are made by tiles.
    has_tiles: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

/// A loop over slices that is compiled once for every instruction set. `run` is marked `#[inline(always)]`, so that
/// it becomes part of the function compiled for the instructions.
pub trait Pass {
    /// What it gives.
    type Output;
    /// The loop. `FMA`: the machine multiplies and adds in one instruction.
    fn run<const FMA: bool>(self) -> Self::Output;
}

impl Isa {
    /// Everything that this machine has, from the slowest on.
    pub fn all() -> Vec<Self> {
        let mut levels = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            levels.extend(avx2.then_some(Level::Avx2));
            levels.extend(avx512.then_some(Level::Avx512));
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            levels.extend(bf16.then_some(Level::Avx512Bf16));
        }
        let vectors = levels.into_iter().map(|level| Self {
            level,
            has_tiles: false,
        });
        let mut found: Vec<Self> = vectors.collect();
        #[cfg(target_arch = "x86_64")]
        if let Some(best) = found.last().copied().filter(|_| tiles_are_right()) {
            found.push(Self {
                has_tiles: true,
                ..best
            });
        }
        found
    }

    /// The fastest with AMX, whose instructions are emulated if this machine has none: slow, and right.
    #[cfg(all(test, target_arch = "x86_64"))]
    pub fn with_tiles() -> Self {
        if !super::amx::available() {
            super::amx::emulator::install();
        }
        Self {
            has_tiles: true,
            ..Self::best()
        }
    }

    /// The fastest that this machine has, or the one that `ARCFACE_HEAD_INSTRUCTIONS` names.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let mut all = Self::all();
            if let Ok(name) = std::env::var(CHOICE) {
                match all.iter().find(|isa| isa.name() == name) {
                    Some(chosen) => return *chosen,
                    None => {
                        let names: Vec<&str> = all.iter().map(|isa| isa.name()).collect();
                        warn!("{CHOICE}={name}: this machine has {}", names.join(", "));
                    }
                }
            }
            all.pop().expect("every machine has the portable one")
        })
    }

    /// True if products of bf16 pairs are one instruction.
    pub fn multiplies_bf16(self) -> bool {
        self.has_tiles || self.name() == "avx512_bf16"
    }

    /// True if that instruction multiplies tiles.
    pub fn has_tiles(self) -> bool {
        self.has_tiles
    }

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self.level {
            _ if self.has_tiles => "amx_bf16",
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "avx512_bf16",
        }
    }

    pub(super) fn level(self) -> Level {
        self.level
    }

    /// Runs the loop with these instructions.
    pub fn run<P: Pass>(self, pass: P) -> P::Output {
        match self.level {
            Level::Portable => pass.run::<false>(),
            // SAFETY: an `Isa` of this level exists only where `Isa::all` found the features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2(pass) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512(pass) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<P: Pass>(pass: P) -> P::Output {
    pass.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<P: Pass>(pass: P) -> P::Output {
    pass.run::<true>()
}

/// True if the machine has tiles and they multiply as they should: nobody ran them on every processor that has them, so each proves itself.
#[cfg(target_arch = "x86_64")]
fn tiles_are_right() -> bool {
    static RIGHT: OnceLock<bool> = OnceLock::new();
    *RIGHT.get_or_init(|| {
        if !super::amx::available() {
            return false;
        }
        let isa = Isa {
            level: Level::Portable,
            has_tiles: true,
        };
        let is_right = gemm::is_right(isa, Format::Bf16);
        if !is_right {
            warn!("AMX multiplies wrongly on this machine and is not used");
        }
        is_right
    })
}
