//! `arcface-worker export`: weights for other programs.

use std::path::PathBuf;

use arcface_proto::failure::{ExitCode, Failure};

use crate::export::{pytorch, safetensors, weights};

/// Arguments of `export`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  \
    arcface-worker export --network r50 --weights model.safetensors --format pytorch -o backbone.pth")]
pub struct ExportArgs {
    /// Network that the weights belong to; `arcface-worker networks` lists them.
    #[arg(long)]
    pub network: String,
    /// Weights: .safetensors, or a PyTorch state_dict (.pth, .pt).
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Form to write.
    #[arg(long, value_enum)]
    pub format: Format,
    /// File to write.
    #[arg(short = 'o', long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Forms of weights.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Names and values, read by many libraries.
    Safetensors,
    /// A state_dict for torch.load.
    Pytorch,
    /// Network and weights for inference engines.
    Onnx,
}

/// Runs `export`.
pub fn run(args: ExportArgs) -> anyhow::Result<()> {
    if args.format == Format::Onnx {
        return Err(
            Failure::new(ExitCode::Usage, "--format onnx is not in this build")
                .hint("export --format pytorch, and let PyTorch write ONNX")
                .into(),
        );
    }
    let backbone = weights::open_backbone(&args.weights, &args.network).map_err(Failure::from)?;
    let tensors = backbone
        .state()
        .iter()
        .map(|entry| (entry.name.as_str(), &entry.tensor));
    let written = match args.format {
        Format::Pytorch => pytorch::write(&args.output, tensors),
        Format::Safetensors | Format::Onnx => safetensors::write(&args.output, tensors),
    };
    Ok(written.map_err(Failure::from)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Backbone, BackboneConfig};

    #[test]
    fn exported_weights_are_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 16)).unwrap();
        backbone.init_random(3);
        let tensors = backbone
            .state()
            .iter()
            .map(|entry| (entry.name.as_str(), &entry.tensor));
        safetensors::write(&at("a.safetensors"), tensors).unwrap();
        let export = |weights, format, output: &str| {
            run(ExportArgs {
                network: "tiny".to_owned(),
                weights,
                format,
                output: at(output),
            })
        };
        export(at("a.safetensors"), Format::Pytorch, "b.pth").unwrap();
        export(at("b.pth"), Format::Safetensors, "c.safetensors").unwrap();
        assert_eq!(
            std::fs::read(at("a.safetensors")).unwrap(),
            std::fs::read(at("c.safetensors")).unwrap()
        );
        // PyTorch lists the entries in the order of its modules.
        let names: Vec<String> = pytorch::read(&at("b.pth"))
            .unwrap()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        let expected: Vec<&String> = backbone.state().iter().map(|entry| &entry.name).collect();
        assert_eq!(names.iter().collect::<Vec<_>>(), expected);
        let error = export(at("b.pth"), Format::Onnx, "d.onnx").unwrap_err();
        assert!(error.to_string().contains("not in this build"), "{error}");
    }
}
