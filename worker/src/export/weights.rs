//! Weights files for backbones: any format that [`super`] reads, fitted to a network by name.

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use arcface_proto::failure::{ExitCode, Failure};
use tch::Tensor;

use super::{FileError, pytorch, safetensors};
use crate::model::{Backbone, BackboneConfig, ModelError};

/// Why weights do not end up in a network.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The network does not exist.
    #[error(transparent)]
    Network(ModelError),
    /// The file's tensors are not the network's.
    #[error("{}: {source}", path.display())]
    Fit {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        source: ModelError,
    },
    /// A tensor has NaN or an infinity: all that is computed with it is worth nothing.
    #[error("{}: key {key} has NaN or an infinity{}", path.display(), more(*.others))]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The first such tensor.
        key: String,
        /// How many more there are.
        others: usize,
    },
}

fn more(others: usize) -> String {
    match others {
        0 => String::new(),
        n => format!(" (and {n} more)"),
    }
}

impl From<WeightsError> for Failure {
    fn from(error: WeightsError) -> Self {
        match error {
            WeightsError::File(error) => error.into(),
            WeightsError::Network(error) => {
                Failure::new(ExitCode::Usage, error.to_string()).hint("arcface-worker networks lists them")
            }
            WeightsError::Fit { .. } => Failure::new(ExitCode::Failed, error.to_string())
                .hint("is --network the one that these weights were trained with?"),
            WeightsError::NotFinite { .. } => Failure::new(ExitCode::Failed, error.to_string())
                .hint("training diverged, or the file is damaged: take weights from before that"),
        }
    }
}

/// The tensors of a weights file by name.
pub struct Weights {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
    /// As the file lists them.
    names: Vec<String>,
    /// What the file holds beside the network.
    beside: Vec<String>,
}

/// Start of every zip archive that has an entry.
const ZIP: &[u8] = b"PK\x03\x04";

/// Forms of weights files.
enum Form {
    Pytorch,
    Safetensors,
}

impl Form {
    /// By content: names lie.
    fn of(path: &Path) -> Result<Self, FileError> {
        let mut start = Vec::new();
        File::open(path)
            .and_then(|file| {
                file.take(pytorch::LEGACY_MAGIC.len() as u64)
                    .read_to_end(&mut start)
            })
            .map_err(FileError::io(path))?;
        if start.starts_with(ZIP) || start == pytorch::LEGACY_MAGIC {
            return Ok(Self::Pytorch);
        }
        if safetensors::header::looks_like(&start) {
            return Ok(Self::Safetensors);
        }
        Err(FileError::Malformed {
            path: path.to_owned(),
            what: match start.get(..start.len().min(4)).unwrap_or_default() {
                [] => "it is empty".to_owned(),
                start => format!("neither safetensors nor PyTorch: it begins with bytes {start:02x?}"),
            },
            hint: "weights are a .safetensors file, or a state_dict written by torch.save",
        })
    }
}

impl Weights {
    /// Reads a safetensors file or a PyTorch state_dict; the content decides which, not the name.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let (tensors, beside) = match Form::of(path)? {
            Form::Pytorch => {
                let content = pytorch::read(path)?;
                (content.tensors, content.beside)
            }
            Form::Safetensors => (safetensors::read(path)?.tensors, Vec::new()),
        };
        let names = tensors.iter().map(|(name, _)| name.clone()).collect();
        Ok(Self {
            path: path.to_owned(),
            tensors: tensors.into_iter().collect(),
            names,
            beside,
        })
    }

    /// What the file holds beside the network, if that was one entry of a checkpoint; the first few keys.
    pub fn beside(&self) -> &[String] {
        &self.beside
    }

    /// Sets every tensor of the backbone. Missing, additional and misshapen ones are errors, and so are those with a value that is
    /// not finite.
    pub fn load_into(&self, backbone: &mut Backbone) -> Result<(), WeightsError> {
        let fit = |source| WeightsError::Fit {
            path: self.path.clone(),
            source,
        };
        backbone
            .load_state(&mut |name| {
                let found = self.tensors.get(name).map(Tensor::shallow_clone);
                // PyTorch counts batches since 0.4.1; nothing is computed from the count.
                let is_count = name.ends_with(".num_batches_tracked");
                found.or_else(|| is_count.then(|| Tensor::from(0i64)))
            })
            .map_err(fit)?;
        let known: std::collections::HashSet<&str> =
            backbone.state().iter().map(|entry| entry.name.as_str()).collect();
        let unknown: Vec<&String> = self
            .names
            .iter()
            .filter(|name| !known.contains(name.as_str()))
            .collect();
        match unknown.first() {
            None => self.check_finite(),
            Some(&key) => Err(fit(ModelError::Unexpected {
                network: backbone.config().network.clone(),
                key: key.clone(),
                others: unknown.len() - 1,
            })),
        }
    }

    fn check_finite(&self) -> Result<(), WeightsError> {
        let is_finite = |tensor: &Tensor| bool::try_from(tensor.isfinite().all()).unwrap_or(false);
        let mut broken = self.names.iter().filter(|name| !is_finite(&self.tensors[*name]));
        match broken.next() {
            None => Ok(()),
            Some(key) => Err(WeightsError::NotFinite {
                path: self.path.clone(),
                key: key.clone(),
                others: broken.count(),
            }),
        }
    }

    /// Builds a network with these weights; they say how long its embedding is.
    pub fn backbone(&self, network: &str) -> Result<Backbone, WeightsError> {
        let registered = Backbone::registered(network).map_err(WeightsError::Network)?;
        let fit = |source| WeightsError::Fit {
            path: self.path.clone(),
            source,
        };
        let size = match self.tensors.get(registered.embedding_entry) {
            Some(entry) => entry.numel() as i64,
            None => {
                return Err(fit(ModelError::Missing {
                    network: network.to_owned(),
                    key: registered.embedding_entry.to_owned(),
                    others: 0,
                }));
            }
        };
        let mut backbone = Backbone::new(&BackboneConfig::new(network, size)).map_err(fit)?;
        self.load_into(&mut backbone)?;
        Ok(backbone)
    }
}

/// Sets a backbone's tensors from a file.
pub fn load_backbone(path: &Path, backbone: &mut Backbone) -> Result<(), WeightsError> {
    Weights::read(path)?.load_into(backbone)
}

/// Builds a network with the weights of a file.
pub fn open_backbone(path: &Path, network: &str) -> Result<Backbone, WeightsError> {
    Weights::read(path)?.backbone(network)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::safetensors;

    #[test]
    fn counts_of_batches_may_be_missing_and_nothing_else() {
        let folder = tempfile::tempdir().expect("scratch");
        let path = folder.path().join("w.safetensors");
        let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 16)).expect("known");
        backbone.fill_golden();
        let state: Vec<(&str, &Tensor)> = backbone
            .state()
            .iter()
            .map(|entry| (entry.name.as_str(), &entry.tensor))
            .collect();
        let without = |ending: &str| {
            let left = state.iter().filter(|(name, _)| !name.ends_with(ending));
            safetensors::write(&path, left.copied()).expect("written");
            open_backbone(&path, "tiny")
        };
        let old = without("num_batches_tracked").expect("as PyTorch before 0.4.1 wrote it");
        for (entry, (_, expected)) in old.state().iter().zip(&state) {
            assert_eq!(entry.tensor, **expected, "{}", entry.name);
        }
        let error = without("bn1.running_mean").err().expect("refused").to_string();
        assert!(error.contains("bn1.running_mean of tiny is missing"), "{error}");
    }

    /// They came in without a word, and `infer` then blamed the images.
    #[test]
    fn a_tensor_that_is_not_finite_is_named() {
        let folder = tempfile::tempdir().expect("scratch");
        let path = folder.path().join("w.safetensors");
        let mut backbone = Backbone::new(&BackboneConfig::new("tiny", 16)).expect("known");
        backbone.fill_golden();
        let mut copies: Vec<(&str, Tensor)> = backbone
            .state()
            .iter()
            .map(|entry| (entry.name.as_str(), entry.tensor.copy()))
            .collect();
        for (bad, key, more) in [
            (f64::NAN, "fc.weight", ""),
            (f64::NEG_INFINITY, "bn1.running_var", " (and 1 more)"),
        ] {
            let (_, tensor) = copies.iter_mut().find(|(name, _)| *name == key).expect("its key");
            let _ = tensor.view([-1]).get(-1).fill_(bad);
            safetensors::write(&path, copies.iter().map(|(name, tensor)| (*name, tensor))).expect("written");
            let failure = Failure::from(open_backbone(&path, "tiny").err().expect("refused"));
            let expected = format!("{}: key {key} has NaN or an infinity{more}", path.display());
            assert_eq!((failure.message, failure.code), (expected, ExitCode::Failed));
        }
    }
}
