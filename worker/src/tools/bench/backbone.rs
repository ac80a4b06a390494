//! How fast a network is.

use super::timing::{median, min, time};
use crate::model::{Backbone, BackboneConfig, DropoutDraw, ForwardMode};
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::Precision,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Forward passes, with `train` backward passes as well.
pub(super) fn measure(repetitions: u32, network: &str, batch: u32, train: bool) -> anyhow::Result<Value> {
    let mut backbone = Backbone::new(&BackboneConfig::new(network, 512))
        .map_err(|error| Failure::new(ExitCode::Usage, error.to_string()))?;
    backbone.init_random(1);
    let images = Tensor::rand([batch.into(), 3, 112, 112], (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
    let times = time(repetitions, |_| {
        if train {
            let mode = ForwardMode::training(Precision::Fp32, DropoutDraw::default());
            backbone
                .forward(&images, &mode)
                .square()
                .mean(Kind::Float)
                .backward();
            for (_, parameter) in backbone.trainable() {
                parameter.shallow_clone().zero_grad();
            }
        } else {
            drop(tch::no_grad(|| {
                backbone.forward(&images, &ForwardMode::evaluation(Precision::Fp32))
            }));
        }
        Ok(())
    })?;
    Ok(json!({
        "bench": "backbone", "network": network, "batch": batch, "train": train, "precision": "fp32",
        "parameters": backbone.num_parameters(), "median_ms": median(&times), "min_ms": min(&times),
        "images_per_second": f64::from(batch) * 1e3 / median(&times),
    }))
}
