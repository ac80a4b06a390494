//! `arcface-worker networks`: every backbone with its size and cost.

use std::io::{self, Write};

use anyhow::Context;
use serde_json::json;

use super::output::Output;
use crate::model::{Backbone, BackboneConfig, IMAGE_SIZE, ModelError, registry::REGISTRY};

/// Embedding length that the table is computed for: the recipes' usual one.
const EMBEDDING_SIZE: i64 = 512;

/// Arguments of `networks`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  arcface-worker networks --output json")]
pub struct NetworksArgs {
    /// How to print the list.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// One line of the list.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    /// Name in job files.
    pub name: &'static str,
    /// Parameter elements, frozen ones included.
    pub parameters: usize,
    /// Parameter elements that train.
    pub trainable: usize,
    /// Multiply-accumulates of one image's evaluation, in units of 10^9.
    pub gmacs: f64,
}

/// Builds every network once and counts.
pub fn describe() -> Result<Vec<Described>, ModelError> {
    let line = |name| {
        let backbone = Backbone::outline(&BackboneConfig::new(name, EMBEDDING_SIZE))?;
        Ok(Described {
            name,
            parameters: backbone.num_parameters(),
            trainable: backbone.num_trainable(),
            gmacs: backbone.macs() as f64 / 1e9,
        })
    };
    REGISTRY.iter().map(|network| line(network.name)).collect()
}

/// Runs `networks`.
pub fn run(args: NetworksArgs) -> anyhow::Result<()> {
    let networks = describe()?;
    let text = match args.output {
        Output::Table => table(&networks),
        Output::Json => format!("{:#}\n", list(&networks)),
    };
    io::stdout().write_all(text.as_bytes()).context("write the list")
}

fn table(networks: &[Described]) -> String {
    let mut text = format!(
        "{:<20} {:>11} {:>7} {:>10}\n",
        "network", "parameters", "GMACs", "embedding"
    );
    for n in networks {
        let millions = format!("{:.2} M", n.parameters as f64 / 1e6);
        text += &format!(
            "{:<20} {millions:>11} {:>7.2} {EMBEDDING_SIZE:>10}\n",
            n.name, n.gmacs
        );
    }
    text += &format!(
        "for one image of {IMAGE_SIZE}x{IMAGE_SIZE}; the embedding's length can be chosen: model.embedding_size\n"
    );
    text
}

fn list(networks: &[Described]) -> serde_json::Value {
    networks
        .iter()
        .map(|n| {
            json!({
                "name": n.name,
                "parameters": n.parameters,
                "trainable_parameters": n.trainable,
                "gmacs": n.gmacs,
                "embedding_size": EMBEDDING_SIZE,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_the_published_ones() {
        let networks = describe().unwrap();
        let gmacs = |name: &str| networks.iter().find(|n| n.name == name).unwrap().gmacs;
        for (name, published) in [
            ("r18", 2.6),
            ("r34", 4.5),
            ("r50", 6.3),
            ("r100", 12.1),
            ("r200", 23.5),
            ("mbf", 0.45),
            ("vit_t", 1.5),
            ("vit_s", 5.7),
            ("vit_b", 11.4),
            ("vit_l_dp005_mask_005", 25.3),
        ] {
            let ours = gmacs(name);
            assert!(
                (ours / published - 1.0).abs() < 0.03,
                "{name}: {ours} GMACs, published {published}"
            );
        }
        // What a network is called after does not change what it computes.
        assert_eq!(gmacs("vit_b"), gmacs("vit_b_dp005_mask_005"));
        // Counted by hand: stem, four stages, embedding layer.
        let stages = 36_929_536 + 3 * 22_077_440;
        assert_eq!(gmacs("tiny"), f64::from(5_419_008 + stages + 3_211_264) / 1e9);
        let text = table(&networks);
        assert!(
            text.lines()
                .any(|line| line.starts_with("r50") && line.contains("43.59 M")),
            "{text}"
        );
        assert_eq!(list(&networks)[1]["parameters"], 24_025_600);
    }
}
