//! Running statistics of a loss: a few numbers, the same on every rank, that move with every micro-batch and count
//! only once the step ends in an update.

use crate::head::HeadError;
use tch::{Kind, Tensor};

/// Numbers by name.
pub(super) struct Statistics {
    names: Vec<&'static str>,
    /// As of the last micro-batch.
    pub(super) now: Vec<f64>,
    /// As of the last update.
    kept: Vec<f64>,
}

impl Statistics {
    pub(super) fn new(initial: &[(&'static str, f64)]) -> Self {
        let now: Vec<f64> = initial.iter().map(|(_, value)| *value).collect();
        Self {
            names: initial.iter().map(|(name, _)| *name).collect(),
            kept: now.clone(),
            now,
        }
    }

    pub(super) fn commit(&mut self) {
        self.kept.copy_from_slice(&self.now);
    }

    pub(super) fn discard(&mut self) {
        self.now.copy_from_slice(&self.kept);
    }

    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        let named = self.names.iter().zip(&self.kept);
        named
            .map(|(name, value)| ((*name).to_owned(), Tensor::from(*value)))
            .collect()
    }

    pub(super) fn load_state(
        &mut self,
        value: &mut dyn FnMut(&str) -> Option<Tensor>,
    ) -> Result<(), HeadError> {
        for (name, kept) in self.names.iter().zip(&mut self.kept) {
            let loaded = value(name).ok_or_else(|| HeadError::MissingState {
                name: (*name).to_owned(),
            })?;
            if loaded.numel() != 1 {
                return Err(HeadError::Form {
                    what: format!("head state {name}"),
                    expected: "[]".to_owned(),
                    got: format!("{:?}", loaded.size()),
                });
            }
            *kept = loaded.to_kind(Kind::Double).reshape([1]).double_value(&[0]);
        }
        self.discard();
        Ok(())
    }
}
