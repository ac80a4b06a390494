//! Pure: checkpoint parts that ranks have made durable, until the parts of every rank are there. What is complete
//! here is whole: one backbone, and every class in exactly one part.

use super::ControlError;
use crate::planted::{Bug, planted};
use arcface_proto::v1::{CheckpointManifest, CheckpointPart, CommitCheckpointRequest, LossScaler, RankId};
use std::collections::BTreeMap;

/// Steps whose parts are awaited at the same time; older ones are given up, their ranks have moved on.
const MAX_STEPS: usize = 4;
/// Parts of one rank: backbone, head, and room for a head that is cut into several files.
const MAX_PARTS: usize = 64;
/// Version of the manifest's layout.
const FORMAT: u32 = 1;

struct Step {
    epoch: u32,
    epoch_samples: u64,
    directory: String,
    num_classes: u32,
    scaler: Option<LossScaler>,
    num_image: Option<u64>,
    parts: BTreeMap<u32, Vec<CheckpointPart>>,
    /// Longest that a rank took to write its parts.
    persist_seconds: Option<f64>,
}

/// Parts of the checkpoints that one generation is writing.
#[derive(Default)]
pub struct Prepared {
    steps: BTreeMap<u64, Step>,
}

impl Prepared {
    /// Forgets everything: the generation is over.
    pub fn clear(&mut self) {
        self.steps.clear();
    }

    /// Forgets a step and all before it: it was committed.
    pub fn committed(&mut self, step: u64) {
        self.steps = self.steps.split_off(&step.saturating_add(1));
    }

    /// Ranks whose parts of a step are awaited.
    pub fn missing(&self, step: u64, world_size: u32) -> impl Iterator<Item = u32> {
        let parts = self.steps.get(&step).map(|step| &step.parts);
        (0..world_size).filter(move |rank| parts.is_some_and(|parts| !parts.contains_key(rank)))
    }

    /// Seconds that the slowest of the ranks which have written their parts of a step took for it, if any has told.
    pub fn persist_seconds(&self, step: u64) -> Option<f64> {
        self.steps.get(&step)?.persist_seconds
    }

    /// Takes a rank's parts; the manifest once all `world_size` ranks' parts are there. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`ControlError::Invalid`] for parts that cannot be part of a checkpoint, or do not fit together.
    pub fn add(
        &mut self,
        id: &RankId,
        request: &CommitCheckpointRequest,
        world_size: u32,
    ) -> Result<Option<CheckpointManifest>, ControlError> {
        check_parts(request)?;
        let step = self.steps.entry(request.step).or_insert_with(|| Step {
            epoch: request.epoch,
            epoch_samples: request.epoch_samples,
            directory: request.directory.clone(),
            num_classes: request.num_classes,
            scaler: request.scaler,
            num_image: request.num_image,
            parts: BTreeMap::new(),
            persist_seconds: None,
        });
        let ours = (
            step.epoch,
            step.epoch_samples,
            step.directory.as_str(),
            step.num_classes,
            step.scaler,
            step.num_image,
        );
        let theirs = (
            request.epoch,
            request.epoch_samples,
            request.directory.as_str(),
            request.num_classes,
            request.scaler,
            request.num_image,
        );
        if ours != theirs {
            return Err(ControlError::invalid(
                "directory",
                format!(
                    "rank {} and its peers disagree on step {} (epoch, samples, directory, classes, loss scale, images): {theirs:?} and {ours:?}",
                    id.rank, request.step
                ),
            ));
        }
        step.parts.insert(id.rank, request.parts.clone());
        let told = request.persist_seconds.filter(|seconds| *seconds >= 0.0);
        step.persist_seconds = told.into_iter().chain(step.persist_seconds).reduce(f64::max);
        let enough = world_size - u32::from(world_size > 1 && planted(Bug::CommitBeforeLastPart));
        let complete = step.parts.len() as u32 >= enough;
        let manifest = match complete {
            true => Some(manifest(id, request.step, step, world_size)?),
            false => None,
        };
        while self.steps.len() > MAX_STEPS {
            self.steps.pop_first();
        }
        Ok(manifest)
    }
}

fn check_parts(request: &CommitCheckpointRequest) -> Result<(), ControlError> {
    check_path("directory", &request.directory, true)?;
    if request.parts.len() > MAX_PARTS {
        return Err(ControlError::invalid(
            "parts",
            format!("{} are more than {MAX_PARTS}", request.parts.len()),
        ));
    }
    for (index, part) in request.parts.iter().enumerate() {
        let field = |name: &str| format!("parts[{index}].{name}");
        check_path(&field("file"), &part.file, false)?;
        if part.blake3.len() != 64 || !part.blake3.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ControlError::invalid(
                field("blake3"),
                "is not 64 hexadecimal digits",
            ));
        }
        if part.class_lo > part.class_hi || part.class_hi > request.num_classes {
            let range = format!(
                "{}..{} is not within 0..{}",
                part.class_lo, part.class_hi, request.num_classes
            );
            return Err(ControlError::invalid(field("class_hi"), range));
        }
    }
    Ok(())
}

/// A name that stays below the directory that it is relative to.
fn check_path(field: &str, path: &str, folders: bool) -> Result<(), ControlError> {
    let parts_are_plain = path
        .split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..");
    let plain = (1..=255).contains(&path.len())
        && parts_are_plain
        && (folders || !path.contains('/'))
        && !path.chars().any(char::is_control);
    match plain {
        true => Ok(()),
        false => {
            let shown: String = path.chars().take(64).collect();
            Err(ControlError::invalid(
                field,
                format!("{shown:?} is not a plain relative name"),
            ))
        }
    }
}

fn manifest(
    id: &RankId,
    number: u64,
    step: &Step,
    world_size: u32,
) -> Result<CheckpointManifest, ControlError> {
    let mut parts: Vec<CheckpointPart> = step.parts.values().flatten().cloned().collect();
    // The backbone and what else holds no classes first, in the order of the ranks; then the head by class.
    parts.sort_by_key(|part| (part.class_hi > part.class_lo, part.class_lo));
    let mut next_class = 0;
    for part in parts.iter().filter(|part| part.class_hi > part.class_lo) {
        if part.class_lo != next_class {
            let problem = format!(
                "{} begins at class {}, the parts before it end at {next_class}",
                part.file, part.class_lo
            );
            return Err(ControlError::invalid("parts", problem));
        }
        next_class = part.class_hi;
    }
    if next_class != step.num_classes && !planted(Bug::CommitBeforeLastPart) {
        let problem = format!("they hold {next_class} of {} classes", step.num_classes);
        return Err(ControlError::invalid("parts", problem));
    }
    let mut files: Vec<&str> = parts.iter().map(|part| part.file.as_str()).collect();
    files.sort_unstable();
    if let Some(twice) = files.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ControlError::invalid(
            "parts",
            format!("two are named {}", twice[0]),
        ));
    }
    if !files.contains(&"backbone.safetensors") {
        return Err(ControlError::invalid(
            "parts",
            "no rank wrote backbone.safetensors",
        ));
    }
    Ok(CheckpointManifest {
        format: FORMAT,
        job_id: id.job_id.clone(),
        generation: id.generation,
        step: number,
        epoch: step.epoch,
        epoch_samples: step.epoch_samples,
        world_size,
        num_classes: step.num_classes,
        directory: step.directory.clone(),
        parts,
        committed_at: None,
        scaler: step.scaler,
        damage: None,
        num_image: step.num_image,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(file: &str, class_lo: u32, class_hi: u32) -> CheckpointPart {
        CheckpointPart {
            file: file.into(),
            bytes: 1,
            blake3: "0".repeat(64),
            class_lo,
            class_hi,
        }
    }

    fn request(step: u64, parts: Vec<CheckpointPart>) -> CommitCheckpointRequest {
        CommitCheckpointRequest {
            rank: None,
            step,
            epoch: 1,
            epoch_samples: 64,
            directory: format!("checkpoints/step-{step}"),
            num_classes: 10,
            parts,
            scaler: Some(LossScaler {
                scale: 32768.0,
                good_updates: 9,
            }),
            persist_seconds: None,
            num_image: Some(640),
        }
    }

    fn rank(rank: u32) -> RankId {
        RankId {
            job_id: "job-000000000001".into(),
            generation: 2,
            rank,
        }
    }

    #[test]
    fn a_checkpoint_is_complete_with_the_last_ranks_parts() {
        let mut prepared = Prepared::default();
        let one = CommitCheckpointRequest {
            persist_seconds: Some(2.5),
            ..request(5, vec![part("head-5-10.safetensors", 5, 10)])
        };
        let zero = request(
            5,
            vec![
                part("head-0-5.safetensors", 0, 5),
                part("backbone.safetensors", 0, 0),
            ],
        );
        assert_eq!(prepared.persist_seconds(5), None);
        assert_eq!(prepared.add(&rank(1), &one, 2).expect("valid"), None);
        assert_eq!(prepared.add(&rank(1), &one, 2).expect("repeated"), None);
        let manifest = prepared
            .add(&rank(0), &zero, 2)
            .expect("valid")
            .expect("complete");
        assert_eq!(prepared.persist_seconds(5), Some(2.5), "of the slowest");
        let files: Vec<_> = manifest.parts.iter().map(|part| part.file.as_str()).collect();
        assert_eq!(
            files,
            [
                "backbone.safetensors",
                "head-0-5.safetensors",
                "head-5-10.safetensors"
            ]
        );
        assert_eq!(
            (manifest.step, manifest.generation, manifest.world_size),
            (5, 2, 2)
        );
        assert_eq!(manifest.scaler, one.scaler);
        prepared.committed(5);
        assert_eq!(
            prepared.add(&rank(0), &zero, 2).expect("valid"),
            None,
            "a later commit begins anew"
        );
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let backbone = || part("backbone.safetensors", 0, 0);
        for (parts, why) in [
            (
                vec![part("head-0-10.safetensors", 0, 10)],
                "no rank wrote backbone.safetensors",
            ),
            (
                vec![backbone(), part("a", 0, 5), part("b", 6, 10)],
                "b begins at class 6, the parts before it end at 5",
            ),
            (
                vec![backbone(), part("a", 0, 6), part("b", 5, 10)],
                "b begins at class 5, the parts before it end at 6",
            ),
            (vec![backbone(), part("a", 0, 9)], "they hold 9 of 10 classes"),
            (
                vec![backbone(), part("a", 0, 5), part("a", 5, 10)],
                "two are named a",
            ),
            (vec![part("../x", 0, 10)], "\"../x\" is not a plain relative name"),
            (vec![part("a/x", 0, 10)], "\"a/x\" is not a plain relative name"),
            (vec![part("a", 3, 11)], "3..11 is not within 0..10"),
        ] {
            let error = Prepared::default()
                .add(&rank(0), &request(1, parts), 1)
                .expect_err("refused");
            assert!(error.to_string().contains(why), "{error}");
        }
        let mut bad = request(1, vec![]);
        for directory in ["", "/etc", "a//b", "a/../b", ".."] {
            bad.directory = directory.into();
            assert!(
                Prepared::default().add(&rank(0), &bad, 1).is_err(),
                "{directory:?}"
            );
        }
    }

    #[test]
    fn ranks_must_agree_and_old_steps_are_given_up() {
        let mut prepared = Prepared::default();
        prepared.add(&rank(0), &request(1, vec![]), 2).expect("valid");
        let mut other = request(1, vec![]);
        other.epoch_samples = 65;
        assert!(prepared.add(&rank(1), &other, 2).is_err());
        let mut other = request(1, vec![]);
        other.scaler = None;
        assert!(prepared.add(&rank(1), &other, 2).is_err());
        for step in 2..100 {
            prepared.add(&rank(0), &request(step, vec![]), 2).expect("valid");
        }
        assert_eq!(prepared.steps.len(), MAX_STEPS);
    }
}
