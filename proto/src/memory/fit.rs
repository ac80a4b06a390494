//! What would make a job fit: changes of the job file, each tried out with the same account. The fewest changes that fit, and
//! of each the mildest value.

use super::{Device, Job, ours};
use crate::spec::{Accumulation, HeadImplementation, JobSpec, Optimizer, Precision};

/// Most proposals: the rest differs in how much is changed, not in what.
const MOST: usize = 8;
/// Most ranks of a job.
const MOST_RANKS: u32 = 4096;
/// Shares of classes that recipes use.
const RATES: [f64; 7] = [0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01];

/// Where a job is to run.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Identities, also where the job leaves them out.
    pub num_classes: u32,
    /// Ranks.
    pub world_size: u32,
    /// What a rank computes with.
    pub device: Device,
    /// Bytes that a rank may take.
    pub usable: u64,
}

impl Place {
    /// Bytes that a rank of the job takes here; `None` for a network without a line in the table.
    pub fn takes(&self, spec: &JobSpec) -> Option<u64> {
        let job = Job::of(spec, self.num_classes, self.world_size)?;
        Some(ours(&job, self.device).total())
    }
}

/// A line of the job file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its path.
    pub field: &'static str,
    /// The new value, as TOML.
    pub value: String,
}

/// Changes that make a job fit.
#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    /// All of them together.
    pub changes: Vec<Change>,
    /// What else they mean, in words.
    pub notes: Vec<&'static str>,
    /// Bytes that a rank takes then.
    pub total: u64,
    /// The job with the changes.
    pub spec: JobSpec,
    /// Its ranks.
    pub world_size: u32,
}

/// Changes a job and its ranks; false if it does not go with what was changed before.
type Apply = dyn Fn(&mut JobSpec, &mut u32) -> bool;

/// A value that one thing could have instead.
struct Setting {
    changes: Vec<Change>,
    note: &'static str,
    apply: Box<Apply>,
}

impl Setting {
    fn new(changes: Vec<Change>, apply: impl Fn(&mut JobSpec, &mut u32) -> bool + 'static) -> Self {
        Self {
            changes,
            note: "",
            apply: Box::new(apply),
        }
    }

    /// A change that goes with every other.
    fn one(change: Change, apply: impl Fn(&mut JobSpec) + 'static) -> Self {
        Self::new(vec![change], move |spec, _| {
            apply(spec);
            true
        })
    }

    fn note(self, note: &'static str) -> Self {
        Self { note, ..self }
    }
}

fn change(field: &'static str, value: impl ToString) -> Change {
    Change {
        field,
        value: value.to_string(),
    }
}

/// The changes that make a job fit that does not: all single ones, or if there is none all pairs, and so on. Empty if
/// everything together does not help.
pub fn proposals(spec: &JobSpec, place: &Place) -> Vec<Proposal> {
    let levers = levers(spec, place.world_size);
    for size in 1..=levers.len() {
        let found: Vec<Proposal> = subsets(levers.len(), size)
            .into_iter()
            .filter_map(|subset| {
                let chosen: Vec<&[Setting]> = subset.iter().map(|&lever| levers[lever].as_slice()).collect();
                mildest(spec, place, &chosen)
            })
            .take(MOST)
            .collect();
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

/// The least that a rank of this job can take on as many ranks as there are, with all changes.
pub fn least(spec: &JobSpec, place: &Place) -> Option<u64> {
    let mut spec = spec.clone();
    let mut world_size = place.world_size;
    for lever in levers(&spec, world_size) {
        let Some(last) = lever.last() else { continue };
        if last.changes.iter().all(|change| change.field != "job.world_size") {
            (last.apply)(&mut spec, &mut world_size);
        }
    }
    place.takes(&spec)
}

/// What could be changed, the least of a change first; and for each the values from mild to severe.
fn levers(spec: &JobSpec, world_size: u32) -> Vec<Vec<Setting>> {
    let mut levers = Vec::new();
    if spec.head.implementation == HeadImplementation::Plain && spec.head.loss.centers() == 1 {
        let tiled = change("head.implementation", "\"tiled\"");
        levers.push(vec![Setting::one(tiled, |spec| {
            spec.head.implementation = HeadImplementation::Tiled;
        })]);
    }
    if !spec.model.gradient_checkpointing {
        let checkpointing = change("model.gradient_checkpointing", "true");
        let setting = Setting::one(checkpointing, |spec| spec.model.gradient_checkpointing = true);
        levers.push(vec![
            setting.note("the same weights, about a third more time in the network"),
        ]);
    }
    if spec.train.precision == Precision::Fp32 {
        let bf16 = change("train.precision", "\"bf16\"");
        levers.push(vec![Setting::one(bf16, |spec| {
            spec.train.precision = Precision::Bf16
        })]);
    }
    levers.push(smaller_batches(spec));
    levers.push(more_ranks(spec, world_size));
    levers.push(lower_rates(spec));
    if spec.train.optimizer == Optimizer::AdamW {
        let sgd = change("train.optimizer", "\"sgd\"");
        let setting = Setting::one(sgd, |spec| spec.train.optimizer = Optimizer::Sgd);
        levers.push(vec![
            setting.note("one buffer a weight instead of two; it wants another train.lr"),
        ]);
    }
    levers.retain(|lever| !lever.is_empty());
    levers
}

fn smaller_batches(spec: &JobSpec) -> Vec<Setting> {
    let (batch, steps) = (spec.train.batch_size, spec.train.gradient_acc);
    let parts = (1..16).map(|doublings| 1u32 << doublings);
    let parts = parts.take_while(|parts| batch.is_multiple_of(*parts) && steps.checked_mul(*parts).is_some());
    parts
        .map(|parts| {
            let (smaller, more) = (batch / parts, steps * parts);
            let mut changes = vec![
                change("train.batch_size", smaller),
                change("train.gradient_acc", more),
            ];
            if spec.train.accumulation == Accumulation::Sum {
                changes.push(change("train.accumulation", "\"mean\""));
            }
            Setting::new(changes, move |spec, _| {
                spec.train.batch_size = smaller;
                spec.train.gradient_acc = more;
                spec.train.accumulation = Accumulation::Mean;
                true
            })
            .note("as many samples an update; batch norm sees smaller batches")
        })
        .collect()
}

fn more_ranks(spec: &JobSpec, world_size: u32) -> Vec<Setting> {
    let global = spec.global_batch();
    let factors = (1..13).map(|doublings| 1u32 << doublings);
    let counts = factors.map_while(|factor| {
        world_size
            .checked_mul(factor)
            .filter(|count| *count <= MOST_RANKS)
    });
    let even = counts.filter(|count| global.is_multiple_of(u64::from(*count)));
    even.filter_map(|count| {
        let batch = u32::try_from(global / u64::from(count)).ok()?;
        let changes = vec![change("job.world_size", count), change("train.batch_size", batch)];
        let setting = Setting::new(changes, move |spec, world_size| {
            let global = spec.global_batch();
            let batch = u32::try_from(global / u64::from(count)).unwrap_or(0);
            spec.world_size = count;
            spec.min_world_size = spec.min_world_size.min(count);
            spec.max_world_size = spec.max_world_size.max(count);
            spec.train.batch_size = batch;
            *world_size = count;
            global.is_multiple_of(u64::from(count))
        });
        Some(setting.note("the same global batch, fewer classes a GPU"))
    })
    .collect()
}

fn lower_rates(spec: &JobSpec) -> Vec<Setting> {
    let rates = RATES.into_iter().filter(|rate| *rate < spec.head.sample_rate);
    rates
        .map(|rate| {
            let setting = Setting::one(change("head.sample_rate", rate), move |spec| {
                spec.head.sample_rate = rate;
            });
            setting.note("less workspace; weights and optimizer buffers of all classes stay")
        })
        .collect()
}

/// The mildest values of these levers together that fit.
fn mildest(spec: &JobSpec, place: &Place, levers: &[&[Setting]]) -> Option<Proposal> {
    let mut choices: Vec<Vec<usize>> = vec![Vec::new()];
    for lever in levers {
        choices = choices
            .into_iter()
            .flat_map(|choice| (0..lever.len()).map(move |setting| [choice.as_slice(), &[setting]].concat()))
            .collect();
    }
    choices.sort_by_key(|choice| choice.iter().sum::<usize>());
    choices.into_iter().find_map(|choice| {
        let chosen: Vec<&Setting> = choice
            .iter()
            .zip(levers)
            .map(|(setting, lever)| &lever[*setting])
            .collect();
        attempt(spec, place, &chosen)
    })
}

/// The job with these settings, if it fits.
fn attempt(spec: &JobSpec, place: &Place, settings: &[&Setting]) -> Option<Proposal> {
    let (mut spec, mut world_size) = (spec.clone(), place.world_size);
    let mut changes: Vec<Change> = Vec::new();
    let mut notes: Vec<&'static str> = Vec::new();
    for setting in settings {
        if !(setting.apply)(&mut spec, &mut world_size) {
            return None;
        }
        changes.extend(setting.changes.iter().cloned());
        notes.extend(Some(setting.note).filter(|note| !note.is_empty()));
    }
    // Smaller batches and more ranks both set it: what came of both, once.
    let batch = spec.train.batch_size.to_string();
    let mut seen = Vec::new();
    changes.retain_mut(|change| {
        if change.field == "train.batch_size" {
            change.value.clone_from(&batch);
        }
        let first = !seen.contains(&change.field);
        seen.push(change.field);
        first
    });
    let there = Place { world_size, ..*place };
    let total = there.takes(&spec)?;
    (total <= place.usable).then_some(Proposal {
        changes,
        notes,
        total,
        spec,
        world_size,
    })
}

/// All sets of `size` of `0..count`, in order.
fn subsets(count: usize, size: usize) -> Vec<Vec<usize>> {
    let masks = 0u32..1 << count;
    let mut sets: Vec<Vec<usize>> = masks
        .filter(|mask| mask.count_ones() as usize == size)
        .map(|mask| (0..count).filter(|i| mask & (1 << i) != 0).collect())
        .collect();
    sets.sort();
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_are_all_there() {
        assert_eq!(subsets(3, 2), [vec![0, 1], vec![0, 2], vec![1, 2]]);
        assert_eq!(subsets(7, 7).len(), 1);
    }
}
