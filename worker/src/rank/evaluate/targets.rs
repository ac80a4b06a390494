//! What a job evaluates: verification sets and the IJB benchmarks. Opened before the first step; each gives embeddings of a
//! range of its images, and numbers of those of all.

use crate::data::roots;
use crate::eval::ijb::{
    self, Benchmark, Layout, Protocol, Settings, embed::embed_images, features::MemoryFeatures,
};
use crate::eval::metrics::{FOLDS, folds};
use crate::eval::verification::{self, Embeddings, embed_set};
use crate::eval::{Verification, VerificationSet};
use crate::rank::failure::RankFailure;
use arcface_proto::spec::{JobSpec, is_set_path, set_name};
use arcface_proto::v1::{Evaluation, IjbNumbers};
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Seed of the intervals that are not asked for.
const NO_SEED: u64 = 0;

/// Something to evaluate.
pub enum Target {
    /// A verification set.
    Set(VerificationSet),
    /// IJB-B or IJB-C.
    Ijb(&'static str, Box<Benchmark>),
}

impl Target {
    /// Opens all that a job names: the sets in their order, then the benchmarks.
    ///
    /// # Errors
    /// Permanent, naming the field and what is missing or damaged.
    pub fn open_all(spec: &JobSpec, data_roots: &[PathBuf]) -> Result<Vec<Self>, RankFailure> {
        let mut all = Vec::new();
        for target in &spec.eval.val_targets {
            let path = set_path(&spec.data.rec, target);
            let set = found(&path.to_string_lossy(), data_roots)
                .and_then(|path| VerificationSet::open(&path).map_err(RankFailure::from))
                .and_then(|set| match folds(set.len() / 2, FOLDS) {
                    Ok(_) => Ok(set),
                    Err(error) => Err(RankFailure::from(error)),
                })
                .map_err(|failure| failure.of("eval.val_targets", target))?;
            all.push(Self::Set(set.named(set_name(target))));
        }
        let folders = [&spec.eval.ijbb, &spec.eval.ijbc];
        for ((name, protocol), folder) in Protocol::ALL.into_iter().zip(folders) {
            let Some(folder) = folder else { continue };
            let benchmark = found(folder, data_roots)
                .and_then(|path| open_ijb(&path, protocol))
                .map_err(|failure| failure.of(&format!("eval.{name}"), folder))?;
            all.push(Self::Ijb(name, Box::new(benchmark)));
        }
        Ok(all)
    }

    /// Reads what only the rank that makes numbers needs, so that damage in it is known before the first step too.
    ///
    /// # Errors
    /// Permanent, naming the field.
    pub fn check(&self) -> Result<(), RankFailure> {
        let Self::Ijb(name, benchmark) = self else {
            return Ok(());
        };
        let read = benchmark.pairs().map(drop);
        read.map_err(|error| RankFailure::permanent(format!("eval.{name}: {error}")))
    }

    /// Name of the data set in evaluations.
    pub fn name(&self) -> &str {
        match self {
            Self::Set(set) => set.name(),
            Self::Ijb(name, _) => name,
        }
    }

    /// True for IJB, which has times of its own.
    pub fn is_ijb(&self) -> bool {
        matches!(self, Self::Ijb(..))
    }

    /// Images.
    pub fn images(&self) -> usize {
        match self {
            Self::Set(set) => set.len(),
            Self::Ijb(_, benchmark) => benchmark.images().len(),
        }
    }

    /// Embeds these images and their mirror images, at most `batch` at a time.
    ///
    /// # Errors
    /// An image that cannot be decoded, or what `embed` says.
    pub fn embed(
        &self,
        images: Range<usize>,
        batch: usize,
        embed: &mut dyn FnMut(&Tensor) -> anyhow::Result<Tensor>,
    ) -> Result<Embeddings, RankFailure> {
        Ok(match self {
            Self::Set(set) => embed_set(set, images, batch, embed)?,
            Self::Ijb(_, benchmark) => {
                let MemoryFeatures { feat, feat_flip, dim } =
                    embed_images(benchmark, images, batch, true, embed)?;
                Embeddings {
                    emb: feat,
                    emb_flip: feat_flip,
                    dim,
                }
            }
        })
    }

    /// The numbers of the embeddings of all images. `pause` is called between parts of the work. Step and seconds are the
    /// caller's.
    ///
    /// # Errors
    /// Embeddings that are not finite.
    pub fn score(&self, all: Embeddings, pause: &mut dyn FnMut()) -> Result<Evaluation, RankFailure> {
        let Embeddings { emb, emb_flip, dim } = all;
        match self {
            Self::Set(set) => {
                pause();
                let found = verification::score(set.name(), &emb, &emb_flip, dim, set.issame())?;
                Ok(of_set(found))
            }
            Self::Ijb(name, benchmark) => {
                let features = MemoryFeatures {
                    feat: emb,
                    feat_flip: emb_flip,
                    dim,
                };
                // Intervals take longer than everything else, and nobody would see them.
                let options = ijb::Options {
                    settings: Settings::REFERENCE,
                    all_settings: false,
                    repetitions: 0,
                    seed: NO_SEED,
                };
                let found = ijb::evaluate(benchmark, &features, &options, &mut |_| pause())?;
                Ok(of_ijb(name, &found))
            }
        }
    }
}

fn found(path: &str, data_roots: &[PathBuf]) -> Result<PathBuf, RankFailure> {
    roots::resolve(path, data_roots).map_err(RankFailure::from)
}

fn open_ijb(folder: &Path, protocol: Protocol) -> Result<Benchmark, RankFailure> {
    let benchmark = Benchmark::open(Layout::find(folder, protocol)?, true)?;
    benchmark.check_images()?;
    Ok(benchmark)
}

/// `lfw` lies as `lfw.bin` beside the training data; what looks like a path is one.
fn set_path(rec: &str, target: &str) -> PathBuf {
    if is_set_path(target) {
        return PathBuf::from(target);
    }
    let rec = Path::new(rec);
    let folder = match rec.extension().is_some_and(|ending| ending == "rec") {
        true => rec.parent().unwrap_or(Path::new("")),
        false => rec,
    };
    folder.join(format!("{target}.bin"))
}

fn of_set(found: Verification) -> Evaluation {
    Evaluation {
        dataset: found.name,
        pairs: found.pairs as u64,
        accuracy: found.accuracy,
        accuracy_std: found.accuracy_std,
        xnorm: found.xnorm,
        tar_at_far: found
            .tar_at_far
            .unwrap_or_default()
            .into_iter()
            .map(|(far, tar)| (far.to_owned(), tar))
            .collect(),
        ..Default::default()
    }
}

fn of_ijb(name: &str, found: &ijb::Evaluation) -> Evaluation {
    use ijb::identification::{CLOSED_FARS, RANKS};
    let rates = ijb::FARS.iter().zip(found.verification.tpr);
    let search = found.identification.as_ref();
    let top = search.map(|search| RANKS.into_iter().zip(ijb::report::mean_top(search)));
    let closed = search.and_then(|search| search.joined.as_ref().ok());
    let dir = closed.map(|closed| CLOSED_FARS.into_iter().zip(closed.dir));
    Evaluation {
        dataset: name.to_owned(),
        pairs: found.pairs as u64,
        tar_at_far: rates.map(|((far, _), tpr)| ((*far).to_owned(), tpr)).collect(),
        ijb: Some(IjbNumbers {
            images: found.images as u64,
            templates: found.templates as u64,
            auc: found.verification.roc.auc,
            rank: top
                .into_iter()
                .flatten()
                .map(|(rank, share)| (rank.to_string(), share))
                .collect(),
            dir_at_far: dir
                .into_iter()
                .flatten()
                .filter_map(|(far, found)| Some((far.to_string(), found?.0)))
                .collect(),
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::ijb::identification::RANKS;
    use arcface_proto::spec::Metric;

    /// What `eval.best` may name is what evaluations tell, no more and no less.
    #[test]
    fn the_best_is_of_a_number_that_there_is() {
        let rates = |of: &str, fars: &[(&str, f64)]| -> Vec<String> {
            fars.iter().map(|(far, _)| format!("{of}.tar@{far}")).collect()
        };
        let mut of_set = rates("lfw", &verification::FAR_TARGETS);
        of_set.push("lfw.accuracy".into());
        let mut of_ijb = rates("ijbc", &ijb::FARS);
        of_ijb.push("ijbc.auc".into());
        of_ijb.extend(RANKS.map(|rank| format!("ijbc.rank-{rank}")));
        for (sets, benchmarks, mut told) in [(vec!["lfw"], vec![], of_set), (vec![], vec!["ijbc"], of_ijb)] {
            let named = Metric::all(&sets, &benchmarks)
                .into_iter()
                .map(|metric| metric.to_string());
            let mut named: Vec<String> = named.filter(|name| !name.starts_with("mean.")).collect();
            named.sort();
            told.sort();
            assert_eq!(named, told);
        }
    }

    #[test]
    fn names_lie_beside_the_data_and_paths_are_paths() {
        assert_eq!(set_path("/data/ms1m", "lfw"), PathBuf::from("/data/ms1m/lfw.bin"));
        assert_eq!(
            set_path("/data/ms1m/train.rec", "lfw"),
            PathBuf::from("/data/ms1m/lfw.bin")
        );
        assert_eq!(set_path("synthetic", "/sets/x.bin"), PathBuf::from("/sets/x.bin"));
        assert_eq!(set_path("a", "own.bin"), PathBuf::from("own.bin"));
    }
}
