//! Counter-based random draws: a draw is a pure function of (seed, purpose, counters), so it depends neither on
//! the world size nor on a restart, and needs no state in a checkpoint.

/// What a draw is for: draws of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Order of the samples in an epoch.
    SampleOrder = 1,
    /// Horizontal flip of a training image; counters: epoch, sample.
    Flip = 2,
    /// Negative classes of a step; counters: step, class.
    ClassSampling = 3,
    /// Initial weights of the head; counters: class, dimension.
    HeadInit = 4,
    /// Initial weights of the backbone; counters: hash of the parameter's name, element.
    BackboneInit = 5,
    /// Synthetic faces; counters: identity, image.
    Synthetic = 6,
    /// Dropout; counters: step, sample.
    Dropout = 7,
    /// Residual branches that a sample skips; counters: step, sample and branch.
    DropPath = 8,
    /// Tokens that training hides; counters: step, sample.
    TokenMask = 9,
    /// Size, sharpness and colour of a training image; counters: epoch, sample.
    Appearance = 10,
    /// Subjects drawn to see how certain a rate is; counters: repetition, draw.
    Bootstrap = 16,
    /// Identities and images that a data tool keeps; counters: 0 and the identity, or 1 and the image.
    Subset = 17,
}

/// SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64 bits that mixes well.
pub fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// 64 random bits for one purpose and two counters.
pub fn bits(seed: u64, purpose: Purpose, a: u64, b: u64) -> u64 {
    Draws::new(seed, purpose, a).bits(b)
}

/// The draws of one purpose and first counter: [`bits`] for many second counters, at a quarter of the cost.
#[derive(Clone, Copy, Debug)]
pub struct Draws(u64);

impl Draws {
    /// The draws of `bits(seed, purpose, a, ..)`.
    pub fn new(seed: u64, purpose: Purpose, a: u64) -> Self {
        Self(mix(mix(mix(seed) ^ purpose as u64) ^ a))
    }

    /// What [`mix`] takes with a second counter, for kernels that draw on a GPU.
    pub fn word(&self) -> u64 {
        self.0
    }

    /// `bits(seed, purpose, a, b)`.
    #[inline]
    pub fn bits(&self, b: u64) -> u64 {
        mix(self.0 ^ b)
    }
}

/// Uniform number in [0, 1) with 53 bits.
pub fn uniform(seed: u64, purpose: Purpose, a: u64, b: u64) -> f64 {
    (bits(seed, purpose, a, b) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Standard normal number (Box-Muller on two draws).
pub fn normal(seed: u64, purpose: Purpose, a: u64, b: u64) -> f64 {
    let u1 = 1.0 - uniform(seed, purpose, a, b);
    let u2 = uniform(mix(seed), purpose, a, b);
    (-2.0 * u1.ln()).sqrt() * (std::f64::consts::TAU * u2).cos()
}

/// A stream of draws where counters would be a burden: one synthetic image, one parameter.
#[derive(Clone, Debug)]
pub struct Stream {
    state: u64,
}

impl Stream {
    /// The stream of one purpose and two counters.
    pub fn new(seed: u64, purpose: Purpose, a: u64, b: u64) -> Self {
        Self {
            state: bits(seed, purpose, a, b),
        }
    }

    /// Next 64 bits (SplitMix64).
    pub fn next_bits(&mut self) -> u64 {
        let out = mix(self.state);
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        out
    }

    /// Next uniform number in [0, 1).
    pub fn next_uniform(&mut self) -> f64 {
        (self.next_bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Next uniform number in [lo, hi).
    pub fn next_in(&mut self, lo: f64, hi: f64) -> f64 {
        lo + (hi - lo) * self.next_uniform()
    }

    /// Next standard normal number.
    pub fn next_normal(&mut self) -> f64 {
        let u1 = 1.0 - self.next_uniform();
        let u2 = self.next_uniform();
        (-2.0 * u1.ln()).sqrt() * (std::f64::consts::TAU * u2).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_look_uniform_and_normal() {
        let n = 100_000u64;
        let mean: f64 = (0..n).map(|i| uniform(7, Purpose::Flip, 3, i)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        let draws: Vec<f64> = (0..n).map(|i| normal(7, Purpose::HeadInit, i, 0)).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(
            mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02,
            "{mean} {variance}"
        );
    }

    #[test]
    fn purposes_and_counters_are_independent() {
        let a = bits(1, Purpose::Flip, 2, 3);
        assert_ne!(a, bits(1, Purpose::Dropout, 2, 3));
        assert_ne!(a, bits(1, Purpose::Flip, 3, 2));
        assert_ne!(a, bits(2, Purpose::Flip, 2, 3));
    }
}
