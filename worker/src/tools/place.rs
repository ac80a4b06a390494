//! `--device` of the tools: where they compute.

use crate::{
    device::{Device, Placement},
    export::weights,
    model::Inference,
};
use arcface_proto::{failure::Failure, spec::Precision};
use std::path::Path;

/// Where a tool computes.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct PlaceArgs {
    /// What computes: cpu, or cuda, the first GPU that CUDA_VISIBLE_DEVICES leaves.
    #[arg(long, default_value = "cpu", value_parser = parse)]
    device: Device,
}

fn parse(name: &str) -> Result<Device, String> {
    Device::parse(name).map_err(|failure| failure.message)
}

impl PlaceArgs {
    /// As it was given.
    pub fn name(self) -> &'static str {
        self.device.as_str()
    }

    /// The place, opened for arithmetic of this precision.
    ///
    /// # Errors
    /// Where CUDA cannot be used.
    pub fn open(self, precision: Precision) -> Result<Placement, Failure> {
        Placement::open(self.device.as_str(), precision).map_err(|failure| Failure {
            message: format!("--device {}: {}", self.device.as_str(), failure.message),
            ..failure
        })
    }

    /// A network with its weights from a file, ready to embed in this precision.
    ///
    /// # Errors
    /// As [`open`](Self::open), or where the weights are not the network's.
    pub fn open_network(
        self,
        file: &Path,
        network: &str,
        precision: Precision,
    ) -> Result<Inference, Failure> {
        let place = self.open(precision)?;
        let mut backbone = weights::open_backbone(file, network).map_err(Failure::from)?;
        backbone.move_to(place.device());
        Ok(backbone.for_inference(precision))
    }
}
