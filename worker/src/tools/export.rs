//! `arcface-worker export`: weights for other programs.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use indicatif::DecimalBytes;

use super::output::no_input;
use crate::{
    export::{onnx, pytorch, safetensors, weights},
    model::Backbone,
};

/// Arguments of `export`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker export --network r50 --weights model.safetensors --format pytorch -o backbone.pth\n  \
    arcface-worker export --network r50 --weights model.safetensors --format onnx -o r50.onnx")]
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
    /// File to write. An ONNX network of over 2 GiB has its weights in a second one, FILE.data.
    #[arg(short = 'o', long, value_name = "FILE")]
    pub output: PathBuf,
    /// ONNX: keep batch norms as operators instead of merging them into the layers before them.
    #[arg(long)]
    pub no_fold: bool,
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
    if args.no_fold && args.format != Format::Onnx {
        return Err(Failure::new(ExitCode::Usage, "--no-fold goes with --format onnx alone").into());
    }
    no_input(&args.output, [args.weights.as_path()])?;
    let backbone = weights::open_backbone(&args.weights, &args.network).map_err(Failure::from)?;
    if args.format == Format::Onnx {
        return write_onnx(&args, &backbone);
    }
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

fn write_onnx(args: &ExportArgs, backbone: &Backbone) -> anyhow::Result<()> {
    let options = onnx::Options {
        fold_batch_norm: !args.no_fold,
        ..onnx::Options::default()
    };
    let written = onnx::write(&args.output, backbone, options).map_err(Failure::from)?;
    let mut line = format!(
        "{}: {}, opset {}, input [batch, 3, 112, 112], embedding [batch, {}], {}",
        args.output.display(),
        args.network,
        onnx::OPSET,
        backbone.config().embedding_size,
        DecimalBytes(written.bytes)
    );
    if let Some((data, bytes)) = written.data {
        line += &format!(
            "; weights in {} beside it, {}",
            data.display(),
            DecimalBytes(bytes)
        );
    }
    writeln!(io::stdout(), "{line}").context("write the result")
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
                no_fold: false,
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
            .tensors
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        let expected: Vec<&String> = backbone.state().iter().map(|entry| &entry.name).collect();
        assert_eq!(names.iter().collect::<Vec<_>>(), expected);
        export(at("b.pth"), Format::Onnx, "d.onnx").unwrap();
        export(at("a.safetensors"), Format::Onnx, "e.onnx").unwrap();
        assert_eq!(
            std::fs::read(at("d.onnx")).unwrap(),
            std::fs::read(at("e.onnx")).unwrap()
        );
        let error = export(at("b.pth"), Format::Onnx, "missing/d.onnx").unwrap_err();
        let folder = at("missing").display().to_string();
        assert_eq!(error.to_string(), format!("{folder} does not exist"));
    }
}
