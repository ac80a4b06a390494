//! `arcface-worker import`: weights into safetensors, checked against a network's names and shapes.

use std::path::PathBuf;

use arcface_proto::failure::Failure;

use super::output::no_input;
use crate::{
    export::{
        safetensors,
        weights::{Weights, WeightsError},
    },
    model::{Backbone, BackboneConfig},
};

/// Arguments of `import`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker import --network r50 backbone.pth -o model.safetensors\n  \
    arcface-worker import --network r18 --fill golden -o golden.safetensors")]
pub struct ImportArgs {
    /// A PyTorch state_dict (.pth, .pt), bare or in a training checkpoint, or a .safetensors file.
    #[arg(value_name = "FILE", required_unless_present = "fill")]
    pub file: Option<PathBuf>,
    /// Network that the weights belong to; `arcface-worker networks` lists them.
    #[arg(long)]
    pub network: String,
    /// Instead of a file: weights made by a rule.
    #[arg(long, value_enum, conflicts_with = "file")]
    pub fill: Option<Fill>,
    /// Embedding length of filled weights; a file says it itself.
    #[arg(long, value_name = "D", default_value_t = 512, conflicts_with = "file")]
    pub embedding_size: i64,
    /// File to write.
    #[arg(short = 'o', long, value_name = "OUT.safetensors")]
    pub output: PathBuf,
}

/// Rules that make weights.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// A function of every tensor's name: what golden files were computed with.
    Golden,
}

/// Runs `import`.
pub fn run(args: ImportArgs) -> anyhow::Result<()> {
    no_input(&args.output, args.file.as_deref())?;
    let backbone = match (&args.file, args.fill) {
        (Some(file), _) => {
            let weights = Weights::read(file).map_err(Failure::from)?;
            let backbone = weights.backbone(&args.network).map_err(Failure::from)?;
            if !weights.beside().is_empty() {
                eprintln!("{}: left out: {}", file.display(), weights.beside().join(", "));
            }
            backbone
        }
        (None, _) => {
            let config = BackboneConfig::new(&args.network, args.embedding_size);
            let mut backbone =
                Backbone::new(&config).map_err(|error| Failure::from(WeightsError::Network(error)))?;
            backbone.fill_golden();
            backbone
        }
    };
    let state = backbone.state();
    let tensors = state.iter().map(|entry| (entry.name.as_str(), &entry.tensor));
    safetensors::write(&args.output, tensors).map_err(Failure::from)?;
    eprintln!(
        "{}: {} tensors, {} parameters, embedding size {}",
        args.output.display(),
        state.len(),
        backbone.num_parameters(),
        backbone.config().embedding_size
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use arcface_proto::failure::{ExitCode, report};
    use tch::Tensor;

    use super::*;
    use crate::export::pytorch;

    fn import(network: &str, file: Option<PathBuf>, output: PathBuf) -> anyhow::Result<()> {
        run(ImportArgs {
            fill: file.is_none().then_some(Fill::Golden),
            file,
            network: network.to_owned(),
            embedding_size: 32,
            output,
        })
    }

    fn said(result: anyhow::Result<()>) -> (String, ExitCode) {
        report(result.expect_err("must fail").as_ref())
    }

    #[test]
    fn pytorch_weights_come_in_with_the_size_that_they_have() {
        let folder = tempfile::tempdir().unwrap();
        let golden = folder.path().join("golden.safetensors");
        import("tiny", None, golden.clone()).unwrap();
        let content = safetensors::read(&golden).unwrap();
        // As a data-parallel wrapper names them.
        let prefixed: Vec<(String, &Tensor)> = content
            .tensors
            .iter()
            .map(|(name, tensor)| (format!("module.{name}"), tensor))
            .collect();
        let pth = folder.path().join("backbone.pth");
        pytorch::write(
            &pth,
            prefixed.iter().map(|(name, tensor)| (name.as_str(), *tensor)),
        )
        .unwrap();
        let back = folder.path().join("back.safetensors");
        import("tiny", Some(pth), back.clone()).unwrap();
        assert_eq!(std::fs::read(&golden).unwrap(), std::fs::read(&back).unwrap());
    }

    #[test]
    fn what_does_not_fit_is_named_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        import("tiny", None, at("good.safetensors")).unwrap();
        let good = safetensors::read(&at("good.safetensors")).unwrap().tensors;
        let out = at("out.safetensors");
        let write = |name: &str, tensors: &[(String, Tensor)]| {
            safetensors::write(&at(name), tensors.iter().map(|(n, t)| (n.as_str(), t))).unwrap();
            Some(at(name))
        };
        let copy = || {
            good.iter()
                .map(|(n, t)| (n.clone(), t.shallow_clone()))
                .collect::<Vec<_>>()
        };

        let mut lacking = copy();
        lacking.retain(|(name, _)| name != "fc.weight");
        let (text, code) = said(import("tiny", write("lacking", &lacking), out.clone()));
        assert!(
            text.contains("lacking: key fc.weight of tiny is missing"),
            "{text}"
        );
        assert_eq!(code, ExitCode::Failed);

        let mut other = copy();
        other.push(("head.weight".to_owned(), Tensor::from(1f32)));
        let (text, _) = said(import("tiny", write("other", &other), out.clone()));
        assert!(text.contains("key head.weight is not one of tiny's"), "{text}");

        let mut misshapen = copy();
        for (name, tensor) in &mut misshapen {
            if name == "conv1.weight" {
                *tensor = tensor.reshape([-1]);
            }
        }
        let (text, _) = said(import("tiny", write("misshapen", &misshapen), out.clone()));
        assert!(text.contains("has shape [432], expected [16, 3, 3, 3]"), "{text}");

        let (text, _) = said(import("r18", Some(at("good.safetensors")), out.clone()));
        assert!(text.contains("hint: is --network"), "{text}");
        let (text, code) = said(import("r51", Some(at("good.safetensors")), out.clone()));
        assert!(
            text.contains("unknown network \"r51\"") && code == ExitCode::Usage,
            "{text}"
        );
        let (text, code) = said(import("tiny", Some(at("nowhere.pth")), out.clone()));
        assert!(
            text.contains("nowhere.pth does not exist") && code == ExitCode::NotFound,
            "{text}"
        );
        let bytes = std::fs::read(at("good.safetensors")).unwrap();
        std::fs::write(at("cut"), &bytes[..bytes.len() / 2]).unwrap();
        let (text, _) = said(import("tiny", Some(at("cut")), out.clone()));
        assert!(text.contains("cut off"), "{text}");
        assert!(!out.exists(), "nothing is written when something does not fit");
    }
}
