//! Sizes of the networks, as far as memory depends on them. The numbers are those of the networks themselves: a test of the
//! worker counts them anew (`worker/src/model/footprint.rs`) and fails where this table says otherwise.

mod table;

pub use table::NETWORKS;

/// Embedding length that the numbers of passes are for; what depends on it beyond that is a few kilobytes an image.
pub const EMBEDDING_SIZE: u64 = 512;

/// Batches whose highest moments are in the table: between them one of these is the highest, or nearly.
pub const BATCHES: [u64; 4] = [1, 8, 64, 512];

/// A number that grows with the embedding's length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerDim {
    /// Whatever the length.
    pub base: u64,
    /// For each of its elements.
    pub per_dim: u64,
}

impl PerDim {
    /// The number for an embedding of this length.
    pub fn of(self, embedding_size: u64) -> u64 {
        self.base
            .saturating_add(self.per_dim.saturating_mul(embedding_size))
    }
}

/// Bytes that grow with the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerImage {
    /// For each image.
    pub per_image: u64,
    /// Whatever the batch.
    pub fixed: u64,
}

impl PerImage {
    /// Bytes for a batch of so many.
    pub fn bytes(self, images: u64) -> u64 {
        self.per_image.saturating_mul(images).saturating_add(self.fixed)
    }
}

/// A training pass beside parameters, their gradients and the images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Kept for the way back, at its beginning: activations, and copies of weights in the reduced precision.
    pub kept: PerImage,
    /// The highest moment of the way back at each of [`BATCHES`].
    pub backward: [PerImage; 4],
}

impl Pass {
    /// The highest moment of the way back, for a batch of so many.
    pub fn highest(&self, images: u64) -> u64 {
        let moments = self.backward.iter();
        moments.map(|moment| moment.bytes(images)).max().unwrap_or(0)
    }
}

/// A network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Name in job files.
    pub name: &'static str,
    /// Elements of parameters that train.
    pub trainable: PerDim,
    /// Elements of parameters that do not.
    pub frozen: PerDim,
    /// Bytes of batch norm statistics.
    pub buffer_bytes: PerDim,
    /// Elements of the largest trainable parameter: the larger of the two numbers.
    pub largest: PerDim,
    /// A pass of libtorch's operations in f32: with everything kept, and with the trunk's activations computed again.
    pub fp32: [Pass; 2],
    /// The same in bf16 or fp16.
    pub half: [Pass; 2],
    /// In f32 with batch norms that are one with what follows them (`worker/src/model/norm/`), on the CPU or a GPU.
    pub fused_fp32: [Pass; 2],
    /// The same in bf16 on the CPU, which computes depthwise convolutions in f32.
    pub cpu_bf16: [Pass; 2],
    /// The same in bf16 on a GPU.
    pub gpu_bf16: [Pass; 2],
}

impl Network {
    /// Elements of the largest trainable parameter.
    pub fn largest_parameter(&self, embedding_size: u64) -> u64 {
        let grows = self.largest.per_dim.saturating_mul(embedding_size);
        self.largest.base.max(grows)
    }

    /// The network of a name.
    pub fn find(name: &str) -> Option<&'static Self> {
        NETWORKS.iter().find(|network| network.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_network_of_a_job_file_has_its_line() {
        let names: Vec<&str> = NETWORKS.iter().map(|network| network.name).collect();
        assert_eq!(names, crate::spec::NETWORKS);
    }

    /// He et al. and the reference's model zoo, with an embedding of 512.
    #[test]
    fn parameters_are_the_published_ones() {
        for (name, millions) in [("r18", 24.03), ("r50", 43.59), ("r100", 65.15), ("mbf", 2.05)] {
            let network = Network::find(name).expect("a line");
            let count = network.trainable.of(512) + network.frozen.of(512);
            let ratio = count as f64 / 1e6 / millions;
            assert!((ratio - 1.0).abs() < 0.01, "{name}: {count}");
        }
    }

    #[test]
    fn reduced_precision_and_recomputing_keep_less() {
        for network in &NETWORKS {
            let [kept, recomputed] = network.fp32.map(|pass| pass.kept.per_image);
            let half = network.half[0].kept.per_image;
            assert!(recomputed < kept, "{}", network.name);
            assert!(half < kept && 2 * half >= kept / 2, "{}", network.name);
            let fused = [network.fused_fp32, network.cpu_bf16, network.gpu_bf16];
            for pass in network
                .fp32
                .iter()
                .chain(&network.half)
                .chain(fused.as_flattened())
            {
                assert!(pass.highest(64) >= pass.kept.per_image * 64, "{}", network.name);
            }
            let [fp32, on_cpu, on_gpu] = fused.map(|passes| passes[0].kept.per_image);
            assert!(
                fp32 <= kept && on_cpu <= half && on_gpu <= on_cpu,
                "{}",
                network.name
            );
        }
    }
}
