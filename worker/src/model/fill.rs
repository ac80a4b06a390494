//! The golden fill rule: weights and inputs that are functions of a tensor's name, so that golden files need not ship
//! weights. It must match its description bit for bit: integers modulo 2^64, values in f64, one rounding to f32.

use tch::{Device, Kind, Tensor};

use super::init::tabulate;
use crate::random::mix;

/// FNV-1a of the UTF-8 bytes of a name (Fowler, Noll, Vo; 64 bits).
pub fn fnv1a64(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Uniform number in [0, 1) of element `index` of a tensor whose name hashes to `hash`.
pub fn unit(hash: u64, index: u64) -> f64 {
    (mix(hash.wrapping_add(index)) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Input tensor `sym(name, shape)`: f32 in [-1, 1).
pub fn symmetric(name: &str, shape: &[i64]) -> Tensor {
    let hash = fnv1a64(name);
    let like = Tensor::empty(shape, (Kind::Float, Device::Cpu));
    tabulate(&like, |i| unit(hash, i as u64) * 2.0 - 1.0)
}

/// Which formula a state entry gets.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Category {
    Count,
    Mean,
    Variance,
    Token,
    Matrix { fan_in: i64 },
    Bias,
    ResidualScale,
    Scale,
    Slope,
}

impl Category {
    /// From the full name, the shape, and whether `prefix + "bias"` is in the same state.
    fn of(name: &str, shape: &[i64], has_bias: bool) -> Self {
        let (prefix, leaf) = split_leaf(name);
        match leaf {
            "num_batches_tracked" => Category::Count,
            "running_mean" => Category::Mean,
            "running_var" => Category::Variance,
            "pos_embed" | "mask_token" | "cls_token" => Category::Token,
            "bias" => Category::Bias,
            _ if shape.len() >= 2 => Category::Matrix {
                fan_in: shape.iter().skip(1).product(),
            },
            // The last batch norm of a residual branch: small, so that deep networks stay bounded.
            _ if has_bias && prefix.ends_with("bn3.") => Category::ResidualScale,
            _ if has_bias => Category::Scale,
            _ => Category::Slope,
        }
    }

    fn value(self, u: f64) -> f64 {
        match self {
            Category::Count => 0.0,
            Category::Mean | Category::Bias => (u - 0.5) * 0.2,
            Category::Variance | Category::Scale => 0.5 + u,
            Category::Token => (u - 0.5) * 0.04,
            Category::Matrix { fan_in } => ((u - 0.5) * 2.0) * (3.0 / fan_in as f64).sqrt(),
            Category::ResidualScale => (0.5 + u) * 0.25,
            Category::Slope => u * 0.25,
        }
    }
}

/// The name up to and including its last dot, and the rest.
fn split_leaf(name: &str) -> (&str, &str) {
    name.split_at(name.rfind('.').map_or(0, |dot| dot + 1))
}

/// Name of the bias beside a weight, if it has one.
pub fn sibling_bias(name: &str) -> String {
    format!("{}bias", split_leaf(name).0)
}

/// The value of state entry `name` by the rule, in the shape and kind of `like`. `has_bias` says whether the state
/// has an entry [`sibling_bias`] of the name.
pub fn value(name: &str, like: &Tensor, has_bias: bool) -> Tensor {
    let category = Category::of(name, &like.size(), has_bias);
    let hash = fnv1a64(name);
    tabulate(like, |i| category.value(unit(hash, i as u64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv1a() {
        // Published vectors of the 64-bit variant.
        assert_eq!(fnv1a64(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a64("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a64("foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn categories_follow_the_table() {
        let of = |name, shape: &[i64], has_bias| Category::of(name, shape, has_bias);
        assert_eq!(
            of("fc.weight", &[512, 25088], true),
            Category::Matrix { fan_in: 25088 }
        );
        assert_eq!(of("layer1.0.bn3.weight", &[64], true), Category::ResidualScale);
        assert_eq!(of("bn1.weight", &[64], true), Category::Scale);
        assert_eq!(of("prelu.weight", &[64], false), Category::Slope);
        assert_eq!(of("pos_embed", &[1, 144, 256], false), Category::Token);
    }
}
