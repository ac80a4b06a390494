//! Which vector instructions this machine has, and how code is compiled for them. Owns the proof that a machine that
//! lacks an instruction never meets it; knows no tensor and no head.
//!
//! It needs `unsafe` because calling a function compiled for more than the baseline is only sound where the machine
//! has it.
#![allow(unsafe_code)]

/// Instructions to compute with. Values exist only for what the machine has ([`Isa::best`], [`Isa::all`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

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
        let mut found = vec![Self(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            found.extend(avx2.then_some(Self(Level::Avx2)));
            found.extend(avx512.then_some(Self(Level::Avx512)));
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            found.extend(bf16.then_some(Self(Level::Avx512Bf16)));
        }
        found
    }

    /// The fastest that this machine has.
    pub fn best() -> Self {
        Self::all().pop().unwrap_or(Self(Level::Portable))
    }

    /// True if products of bf16 pairs are one instruction.
    pub fn multiplies_bf16(self) -> bool {
        self.name() == "avx512_bf16"
    }

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self.0 {
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
        self.0
    }

    /// Runs the loop with these instructions.
    pub fn run<P: Pass>(self, pass: P) -> P::Output {
        match self.0 {
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
