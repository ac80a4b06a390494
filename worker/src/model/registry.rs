//! Every backbone by name, one line each; the same names in the same order as `arcface_proto::spec::NETWORKS`.

use super::{backbone::BackboneConfig, iresnet, layers::Network, mobilefacenet, state::Builder, vit};

/// A network that can be built by name.
pub struct Registered {
    /// Name in job files and on the command line.
    pub name: &'static str,
    /// The state entry whose length is the embedding size.
    pub embedding_entry: &'static str,
    /// Registers its tensors and returns its forward pass.
    pub build: fn(Builder, &BackboneConfig) -> Box<dyn Network>,
}

const fn iresnet(name: &'static str, build: fn(Builder, &BackboneConfig) -> Box<dyn Network>) -> Registered {
    let embedding_entry = iresnet::EMBEDDING_ENTRY;
    Registered {
        name,
        embedding_entry,
        build,
    }
}

const fn mobilefacenet(
    name: &'static str,
    build: fn(Builder, &BackboneConfig) -> Box<dyn Network>,
) -> Registered {
    let embedding_entry = mobilefacenet::EMBEDDING_ENTRY;
    Registered {
        name,
        embedding_entry,
        build,
    }
}

const fn transformer(
    name: &'static str,
    build: fn(Builder, &BackboneConfig) -> Box<dyn Network>,
) -> Registered {
    let embedding_entry = vit::EMBEDDING_ENTRY;
    Registered {
        name,
        embedding_entry,
        build,
    }
}

/// All networks.
pub const REGISTRY: &[Registered] = &[
    iresnet("tiny", |b, c| iresnet::build(b, c, &iresnet::TINY)),
    iresnet("r18", |b, c| iresnet::build(b, c, &iresnet::R18)),
    iresnet("r34", |b, c| iresnet::build(b, c, &iresnet::R34)),
    iresnet("r50", |b, c| iresnet::build(b, c, &iresnet::R50)),
    iresnet("r100", |b, c| iresnet::build(b, c, &iresnet::R100)),
    iresnet("r200", |b, c| iresnet::build(b, c, &iresnet::R200)),
    iresnet("r2060", |b, c| iresnet::build(b, c, &iresnet::R2060)),
    mobilefacenet("mbf", |b, c| mobilefacenet::build(b, c, &mobilefacenet::MBF)),
    mobilefacenet("mbf_large", |b, c| {
        mobilefacenet::build(b, c, &mobilefacenet::MBF_LARGE)
    }),
    transformer("vit_t", |b, c| vit::build(b, c, &vit::T)),
    transformer("vit_t_dp005_mask0", |b, c| vit::build(b, c, &vit::T_DP005_MASK0)),
    transformer("vit_s", |b, c| vit::build(b, c, &vit::S)),
    transformer("vit_s_dp005_mask_0", |b, c| vit::build(b, c, &vit::S_DP005_MASK0)),
    transformer("vit_b", |b, c| vit::build(b, c, &vit::B)),
    transformer("vit_b_dp005_mask_005", |b, c| {
        vit::build(b, c, &vit::B_DP005_MASK005)
    }),
    transformer("vit_l_dp005_mask_005", |b, c| {
        vit::build(b, c, &vit::L_DP005_MASK005)
    }),
    transformer("vit_h", |b, c| vit::build(b, c, &vit::H)),
];

/// The network of a name.
pub fn find(name: &str) -> Option<&'static Registered> {
    REGISTRY.iter().find(|network| network.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_lists_what_a_job_may_name() {
        let names: Vec<&str> = REGISTRY.iter().map(|network| network.name).collect();
        assert_eq!(names, arcface_proto::spec::NETWORKS);
    }
}
