//! How fast a network is.

use super::{
    choice, memory,
    timing::{median, min, time},
};
use crate::model::allocations::Allocations;
use crate::model::{Backbone, BackboneConfig, DropoutDraw, ForwardMode};
use crate::tools::place::PlaceArgs;
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::Precision,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Arguments of `bench backbone`.
#[derive(clap::Args, Debug)]
pub struct BackboneArgs {
    /// Network.
    #[arg(long, default_value = "r18")]
    network: String,
    /// Images.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Arithmetic: fp32, bf16 or fp16.
    #[arg(long, default_value = "fp32", value_parser = choice::<Precision>)]
    precision: Precision,
    #[command(flatten)]
    place: PlaceArgs,
    /// Training mode, and the gradient of every parameter.
    #[arg(long)]
    train: bool,
    /// Compute activations again in the backward pass instead of keeping them.
    #[arg(long, requires = "train")]
    gradient_checkpointing: bool,
}

impl BackboneArgs {
    /// What computes.
    pub(super) fn device(&self) -> &'static str {
        self.place.name()
    }
}

/// Forward passes, with `train` backward passes as well, and the memory that they take beside weights and gradients.
pub(super) fn measure(repetitions: u32, args: &BackboneArgs) -> anyhow::Result<Value> {
    let &BackboneArgs {
        ref network,
        batch,
        precision,
        place,
        train,
        gradient_checkpointing,
    } = args;
    let place = place.open(precision)?;
    let config = BackboneConfig {
        gradient_checkpointing,
        ..BackboneConfig::new(network, 512)
    };
    let mut backbone =
        Backbone::new(&config).map_err(|error| Failure::new(ExitCode::Usage, error.to_string()))?;
    backbone.init_random(1);
    backbone.move_to(place.device());
    backbone.compute_with(place.kernels());
    let parameters = backbone.num_parameters();
    let images = Tensor::rand([batch.into(), 3, 112, 112], (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
    let images = place.take(&images);
    let mut pass: Box<dyn FnMut()> = match train {
        true => {
            for (_, parameter) in backbone.trainable() {
                // As large as the gradients of the first pass, so that these do not count as its memory.
                parameter.mean(Kind::Float).backward();
            }
            Box::new(move || {
                let mode = ForwardMode::training(precision, DropoutDraw::default());
                let pass = backbone.forward_to_train(&images, &mode);
                let gradient = pass.embedding();
                pass.backward(&gradient);
                for (_, parameter) in backbone.trainable() {
                    parameter.shallow_clone().zero_grad();
                }
            })
        }
        false => {
            let network = backbone.for_inference(precision);
            drop(backbone);
            Box::new(move || drop(network.forward(&images)))
        }
    };
    let before = memory::resident();
    memory::forget_peak();
    let mut allocations = Allocations::begin();
    let times = time(repetitions, |_| {
        pass();
        place.wait();
        Ok(())
    })?;
    let peak = match train {
        true => memory::peak()
            .zip(before)
            .map(|(peak, before)| peak.saturating_sub(before)),
        // Of tensors: what the making of the network has freed is there for it, and hides what it takes.
        false => u64::try_from(allocations.take().peak).ok(),
    };
    Ok(json!({
        "bench": "backbone", "network": network, "batch": batch, "train": train, "precision": precision.as_str(),
        "gradient_checkpointing": gradient_checkpointing,
        "peak_bytes": match place.memory() {
            Some(memory) => Some(memory.peak),
            None => peak,
        },
        "parameters": parameters, "median_ms": median(&times), "min_ms": min(&times),
        "images_per_second": f64::from(batch) * 1e3 / median(&times),
    }))
}
