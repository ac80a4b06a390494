//! The sum of the backbone's gradients over the ranks, begun while the way back through the network still goes on: as soon as
//! the gradients of the last layers are there, they are on their way, in buckets.

use super::failure::RankFailure;
use super::step::Says;
use crate::collective::Collective;
use arcface_proto::spec::GradientCompression;
use tch::{Device, Kind, Tensor};

/// Bytes of a bucket, at least: enough to fill a network, few enough that the last one, for which nothing is left to compute,
/// is soon there.
const BUCKET_BYTES: usize = 8 << 20;

/// Which gradients go together, in the order in which they are complete. Pure, and the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets(Vec<Bucket>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Bucket {
    /// Complete once this part of the network was differentiated.
    part: usize,
    /// Parameters, by index, rising.
    params: Vec<usize>,
}

impl Buckets {
    /// For parameters of so many elements, read by these parts of the network.
    pub fn new(elements: &[usize], parts: &[usize]) -> Self {
        let last = parts.iter().copied().max().unwrap_or(0);
        let mut buckets = Vec::new();
        let (mut params, mut bytes) = (Vec::new(), 0);
        for part in (0..=last).rev() {
            let of_part = (0..parts.len()).filter(|&param| parts[param] == part);
            for param in of_part {
                params.push(param);
                bytes += elements[param] * size_of::<f32>();
            }
            if bytes >= BUCKET_BYTES || part == 0 {
                let mut params = std::mem::take(&mut params);
                params.sort_unstable();
                buckets.push(Bucket { part, params });
                bytes = 0;
            }
        }
        Self(buckets)
    }
}

/// The sum at the end of a window.
pub struct GradientSum {
    buckets: Buckets,
    /// What travels instead of f32.
    compressed: Option<Kind>,
    /// Flat, by bucket, of those that were begun.
    begun: Vec<Tensor>,
}

/// What a sum gave.
pub struct Summed {
    /// By parameter, in its shape: the mean over the ranks, divided by the loss scale.
    pub grads: Vec<Tensor>,
    /// The same numbers, in a few long rows.
    pub flats: Vec<Tensor>,
    /// What any rank said.
    pub said: Says,
}

impl GradientSum {
    /// Of gradients that go in these buckets, and as these numbers.
    pub fn new(buckets: Buckets, compression: GradientCompression) -> Self {
        Self {
            buckets,
            compressed: match compression {
                GradientCompression::Off => None,
                GradientCompression::Bf16 => Some(Kind::BFloat16),
                GradientCompression::Fp16 => Some(Kind::Half),
            },
            begun: Vec::new(),
        }
    }

    /// The parts of the network after which a sum begins, in a world of this size.
    pub fn parts(&self, world_size: u32) -> Vec<usize> {
        match world_size {
            1 => Vec::new(),
            _ => self.buckets.0.iter().map(|bucket| bucket.part).collect(),
        }
    }

    /// The gradients of a part of the network, and of all after it, are complete. Parameters without gradient count as zero.
    ///
    /// # Errors
    /// A lost peer.
    pub fn finished(
        &mut self,
        part: usize,
        params: &[Tensor],
        comm: &mut dyn Collective,
    ) -> Result<(), RankFailure> {
        match comm.world_size() {
            // Nobody to wait for later: the copies would only stand beside the activations.
            1 => Ok(()),
            _ => self.begin(part, params, comm),
        }
    }

    fn begin(
        &mut self,
        part: usize,
        params: &[Tensor],
        comm: &mut dyn Collective,
    ) -> Result<(), RankFailure> {
        let _no_grad = tch::no_grad_guard();
        while let Some(bucket) = self.buckets.0.get(self.begun.len()) {
            // The last one goes with what the rank has to say.
            let is_last = self.begun.len() + 1 == self.buckets.0.len();
            if bucket.part < part || is_last {
                break;
            }
            let mut flat = self.packed(flat(params, bucket), comm.world_size());
            comm.begin_sum(&mut flat)?;
            self.begun.push(flat);
        }
        Ok(())
    }

    /// What travels, if it is not what the ranks have. Alone, nobody is sent anything.
    fn kind_sent(&self, world_size: u32) -> Option<Kind> {
        self.compressed.filter(|_| world_size > 1)
    }

    /// A row as it travels: one that is rounded is divided by the number of ranks before, so that the sum is no larger than its terms.
    fn packed(&self, mut flat: Tensor, world_size: u32) -> Tensor {
        match self.kind_sent(world_size) {
            Some(kind) => {
                flat /= f64::from(world_size);
                flat.to_kind(kind)
            }
            None => flat,
        }
    }

    /// All gradients are complete. What the rank `says` travels as a few more elements.
    ///
    /// # Errors
    /// A lost peer.
    pub fn finish(
        &mut self,
        params: &[Tensor],
        comm: &mut dyn Collective,
        says: Says,
        scale: f64,
    ) -> Result<Summed, RankFailure> {
        let world_size = comm.world_size();
        let divisor = match self.kind_sent(world_size) {
            Some(_) => scale,
            None => f64::from(world_size) * scale,
        };
        self.begin(0, params, comm)?;
        let _no_grad = tch::no_grad_guard();
        let own = self.buckets.0.last().map(|bucket| flat(params, bucket));
        let own = own.unwrap_or_else(|| Tensor::zeros([0], (Kind::Float, Device::Cpu)));
        let own = self.packed(own, world_size);
        let (elements, said) = (own.numel() as i64, says.to_elements());
        // Ones and zeros: a sum of a few thousand in any kind is 0 only if all are.
        let said = Tensor::from_slice(&said)
            .to_device(own.device())
            .to_kind(own.kind());
        let mut last = Tensor::cat(&[own, said], 0);
        comm.begin_sum(&mut last)?;
        comm.finish_sums()?;
        // One copy from a GPU, not one a number.
        let heard = last
            .narrow(0, elements, last.numel() as i64 - elements)
            .to_device(Device::Cpu);
        let mut flats = std::mem::take(&mut self.begun);
        flats.push(last.narrow(0, 0, elements));
        let mut flats: Vec<Tensor> = flats.into_iter().map(|flat| flat.to_kind(Kind::Float)).collect();
        let mut grads: Vec<Option<Tensor>> = params.iter().map(|_| None).collect();
        for (bucket, flat) in self.buckets.0.iter().zip(&mut flats) {
            if divisor != 1.0 {
                *flat /= divisor;
            }
            let mut at = 0;
            for &param in &bucket.params {
                let count = params[param].numel() as i64;
                let grad = flat.narrow(0, at, count).view(params[param].size().as_slice());
                grads[param] = Some(grad);
                at += count;
            }
        }
        Ok(Summed {
            grads: grads.into_iter().flatten().collect(),
            flats,
            said: Says::from_elements(|which| heard.double_value(&[which])),
        })
    }
}

/// The gradients of a bucket in one row.
fn flat(params: &[Tensor], bucket: &Bucket) -> Tensor {
    let rows: Vec<Tensor> = bucket
        .params
        .iter()
        .map(|&param| {
            let param = &params[param];
            let grad = param.grad();
            match grad.defined() {
                true => grad.reshape([-1]),
                false => Tensor::zeros([param.numel() as i64], (Kind::Float, param.device())),
            }
        })
        .collect();
    Tensor::cat(&rows, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::{Beside, local};
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        #[test]
        fn every_parameter_is_in_one_bucket_and_none_goes_too_early(
            params in prop::collection::vec((0usize..4_000_000, 0usize..9), 0..60)
        ) {
            let (elements, parts): (Vec<usize>, Vec<usize>) = params.into_iter().unzip();
            let Buckets(buckets) = Buckets::new(&elements, &parts);
            let mut all: Vec<usize> = buckets.iter().flat_map(|bucket| bucket.params.clone()).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..parts.len()).collect::<Vec<_>>());
            for (index, bucket) in buckets.iter().enumerate() {
                prop_assert!(bucket.params.iter().all(|&param| parts[param] >= bucket.part));
                let bytes: usize = bucket.params.iter().map(|&param| elements[param] * 4).sum();
                prop_assert!(bytes >= BUCKET_BYTES || index + 1 == buckets.len());
                prop_assert!(index == 0 || buckets[index - 1].part > bucket.part);
            }
            prop_assert_eq!(buckets.last().map(|bucket| bucket.part), Some(0));
        }
    }

    /// Of three ranks, with and without a part that a rank has no gradient of, whatever was begun before the end, and whatever
    /// numbers it travels as.
    #[test]
    fn the_sum_is_the_mean_of_all_ranks_however_it_is_begun() {
        for (compression, tolerance) in [
            (GradientCompression::Off, 1e-7),
            // Rounded by each rank and by each of the two sums, to 8 and 11 bits.
            (GradientCompression::Bf16, 3.0 / 256.0),
            (GradientCompression::Fp16, 3.0 / 2048.0),
        ] {
            the_sum_is_the_mean(compression, tolerance);
        }
    }

    fn the_sum_is_the_mean(compression: GradientCompression, tolerance: f64) {
        let sizes = [3_000_000usize, 5, 2_500_000, 1, 70];
        let parts = [0, 1, 2, 2, 3];
        let buckets = Buckets::new(&sizes, &parts);
        assert_eq!(buckets.0.len(), 2, "{buckets:?}");
        for eager in [false, true] {
            let world = local::world(3, Duration::from_secs(60)).expect("loopback");
            std::thread::scope(|scope| {
                for comm in world {
                    let buckets = &buckets;
                    scope.spawn(move || {
                        let mut comm = Beside::start(Box::new(comm));
                        let rank = f64::from(comm.rank());
                        let params: Vec<Tensor> = sizes
                            .iter()
                            .map(|&size| {
                                Tensor::ones([size as i64], (Kind::Float, Device::Cpu))
                                    .set_requires_grad(true)
                            })
                            .collect();
                        for (index, param) in params.iter().enumerate() {
                            // Rank 0 has no gradient of parameter 3.
                            if rank > 0.0 || index != 3 {
                                (param * (rank + 10.0 * index as f64)).sum(Kind::Float).backward();
                            }
                        }
                        let mut sum = GradientSum::new(buckets.clone(), compression);
                        if eager {
                            for part in [3, 2, 1, 0] {
                                sum.finished(part, &params, comm.as_mut()).expect("begun");
                            }
                        }
                        let says = Says {
                            busy: rank == 2.0,
                            ..Says::default()
                        };
                        let summed = sum.finish(&params, comm.as_mut(), says, 4.0).expect("summed");
                        for (index, grad) in summed.grads.iter().enumerate() {
                            let own = |rank: f64| rank + 10.0 * index as f64;
                            let total = if index == 3 {
                                own(1.0) + own(2.0)
                            } else {
                                own(0.0) + own(1.0) + own(2.0)
                            };
                            let expected = total / 3.0 / 4.0;
                            let (least, most) = (grad.min().double_value(&[]), grad.max().double_value(&[]));
                            let off = (least - expected).abs().max((most - expected).abs());
                            assert!(
                                off <= tolerance * expected,
                                "{compression:?} {index}: {off} of {expected}"
                            );
                            assert_eq!(grad.kind(), Kind::Float);
                        }
                        let expected = Says {
                            busy: true,
                            ..Says::default()
                        };
                        assert_eq!(summed.said, expected);
                    });
                }
            });
        }
    }
}
