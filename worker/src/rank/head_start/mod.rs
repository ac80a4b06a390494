//! Fine-tuning: class weights that start as those of an earlier head, class by class (`head.init`,
//! `head.class_list`). Classes without a predecessor keep their random start, optimizer state stays zero.

mod class_list;
mod old_head;

use super::failure::RankFailure;
use crate::data::{DataError, roots};
use crate::head::Head;
use arcface_proto::spec::HeadInit;
use arcface_proto::types::ClassRange;
use old_head::OldHead;
use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Longest class list that is read, in bytes: 50 million classes with a name each.
const MAX_LIST: u64 = 2 << 30;
/// Classes whose weights are looked at together.
const CHECKED: i64 = 4096;

/// An old head, and which of its classes each class starts as.
pub struct HeadStart {
    old: OldHead,
    /// By class: the class of the old head, if there is one.
    from: Vec<Option<u32>>,
}

/// Consecutive classes that start as consecutive classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// First class of the old head.
    from: u32,
    /// First row of the new shard.
    at: u32,
    /// How many.
    len: u32,
}

impl HeadStart {
    /// Opens the old head and reads the list.
    ///
    /// # Errors
    /// If something is missing, damaged, or the numbers of classes do not fit.
    pub fn open(init: &HeadInit, num_classes: u32, data_roots: &[PathBuf]) -> Result<Self, RankFailure> {
        let old = OldHead::open(&roots::resolve(&init.path, data_roots)?)?;
        let from = match &init.class_list {
            Some(path) => {
                let path = roots::resolve(path, data_roots)?;
                let text = read_list(&path)?;
                class_list::parse(&text, num_classes, old.classes()).map_err(|what| {
                    RankFailure::permanent(format!("head.class_list: {}: {what}", path.display()))
                        .hint("one line a class: its number in the old head, or new")
                })?
            }
            None if old.classes() == num_classes => (0..num_classes).map(Some).collect(),
            None => {
                return Err(RankFailure::permanent(format!(
                    "head.init: the old head has {} classes, the data set {num_classes}",
                    old.classes()
                ))
                .hint("head.class_list says which class starts as which"));
            }
        };
        Ok(Self { old, from })
    }

    /// Sets the rows of this shard that have a predecessor.
    ///
    /// # Errors
    /// If a row of the old head has another form or a value that is not finite, or a file is damaged.
    pub fn fill(&self, head: &mut dyn Head) -> Result<(), RankFailure> {
        let shard = head.shard();
        let runs = self.runs(shard);
        // The head's own tensors, in their state before the first step.
        let state: HashMap<String, Tensor> = head.state().into_iter().collect();
        let Some(weight) = state.get("weight") else {
            return Err(RankFailure::permanent(
                "head.init: this head has no class weights",
            ));
        };
        self.old.copy(&runs, weight)?;
        check_finite(weight, shard)?;
        head.load_state(0, &mut |name| state.get(name).map(Tensor::shallow_clone))?;
        Ok(())
    }

    /// Adds which class starts as which to a digest.
    pub fn add_to(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.old.classes().to_le_bytes());
        for from in &self.from {
            hasher.update(&from.map_or(u64::MAX, u64::from).to_le_bytes());
        }
    }

    fn runs(&self, shard: ClassRange) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (at, from) in (0u32..).zip(&self.from[shard.lo as usize..shard.hi as usize]) {
            let Some(from) = *from else { continue };
            match runs.last_mut() {
                Some(run) if run.at + run.len == at && run.from + run.len == from => run.len += 1,
                _ => runs.push(Run { from, at, len: 1 }),
            }
        }
        runs
    }
}

fn read_list(path: &Path) -> Result<String, RankFailure> {
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_LIST + 1).read_to_end(&mut bytes))
        .map_err(|error| DataError::io(path, error))?;
    if bytes.len() as u64 > MAX_LIST {
        let what = format!(
            "head.class_list: {}: longer than {MAX_LIST} bytes",
            path.display()
        );
        return Err(RankFailure::permanent(what));
    }
    String::from_utf8(bytes).map_err(|_| {
        RankFailure::permanent(format!(
            "head.class_list: {}: it is not UTF-8 text",
            path.display()
        ))
    })
}

/// One bad row would make every loss bad; it is named before the first step.
fn check_finite(weight: &Tensor, shard: ClassRange) -> Result<(), RankFailure> {
    let rows = i64::from(shard.len());
    for first in (0..rows).step_by(CHECKED as usize) {
        let part = weight.narrow(0, first, CHECKED.min(rows - first));
        let bad = part
            .isfinite()
            .logical_not()
            .flatten(1, -1)
            .any_dim(1, false)
            .nonzero();
        if bad.numel() > 0 {
            let class = i64::from(shard.lo) + first + bad.int64_value(&[0, 0]);
            return Err(RankFailure::permanent(format!(
                "head.init: the weights for class {class} are not finite"
            )));
        }
    }
    Ok(())
}
