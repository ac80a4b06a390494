//! A head from an earlier training, in one of the forms that there are: a checkpoint of ours, one safetensors file,
//! the reference's file for each of its GPUs. Rows are read where they lie, those that are wanted alone.

use super::Run;
use crate::checkpoint::{Checkpoint, read::MappedRows};
use crate::data::{Access, DataError, MappedFile};
use crate::export::kind_of;
use crate::export::{FileError, pytorch::state_dict, safetensors::header};
use crate::rank::failure::RankFailure;
use arcface_proto::types::ClassRange;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Name of the class weights everywhere.
const WEIGHT: &str = "weight";
/// How the reference names what each GPU held: a file of its own, or its part of a checkpoint.
const REFERENCE: [&str; 2] = ["softmax_fc_gpu_", "checkpoint_gpu_"];
/// Bytes that are copied at a time.
const CHUNK: usize = 4 << 20;

/// An old head.
pub(super) struct OldHead {
    path: PathBuf,
    classes: u32,
    place: Place,
}

enum Place {
    /// Parts are compared with their digests when they are used.
    Checkpoint(Box<Checkpoint>),
    Files(Vec<MappedRows>),
}

impl OldHead {
    /// Opens what `path` names.
    pub(super) fn open(path: &Path) -> Result<Self, RankFailure> {
        let (classes, place) = match path.is_dir() {
            true if path.join(crate::checkpoint::manifest::FILE).exists() => {
                let checkpoint = Checkpoint::open_dir(path).map_err(refuse)?;
                (
                    checkpoint.manifest().num_classes,
                    Place::Checkpoint(Box::new(checkpoint)),
                )
            }
            true => {
                let mut files = Vec::new();
                for path in reference_files(path)? {
                    let first = files.last().map_or(0, |rows: &MappedRows| rows.classes.hi);
                    files.push(open_file(&path, first)?);
                }
                (
                    files.last().map_or(0, |rows| rows.classes.hi),
                    Place::Files(files),
                )
            }
            false => {
                let rows = open_file(path, 0)?;
                (rows.classes.hi, Place::Files(vec![rows]))
            }
        };
        Ok(Self {
            path: path.to_owned(),
            classes,
            place,
        })
    }

    /// Number of its classes.
    pub(super) fn classes(&self) -> u32 {
        self.classes
    }

    /// Copies rows into `weight`, `[n, ...]`.
    pub(super) fn copy(&self, runs: &[Run], weight: &Tensor) -> Result<(), RankFailure> {
        match &self.place {
            Place::Files(files) => files.iter().try_for_each(|rows| copy_from(rows, runs, weight)),
            Place::Checkpoint(checkpoint) => {
                let wanted = |held: ClassRange| runs.iter().any(|run| part_of(*run, held).is_some());
                let parts = checkpoint.head_tensor(WEIGHT, &wanted).map_err(refuse)?;
                parts.iter().try_for_each(|rows| copy_from(rows, runs, weight))
            }
        }
        .map_err(|failure| match failure.hint.is_empty() {
            true => failure.hint(format!("head.init is {}", self.path.display())),
            false => failure,
        })
    }
}

fn refuse(error: impl std::fmt::Display) -> RankFailure {
    RankFailure::permanent(format!("head.init: {error}"))
}

/// The reference's files in the order of its GPUs.
fn reference_files(folder: &Path) -> Result<Vec<PathBuf>, RankFailure> {
    let entries = fs::read_dir(folder).map_err(|error| DataError::io(folder, error))?;
    let names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    for prefix in REFERENCE {
        let mut gpus: Vec<u32> = names
            .iter()
            .filter_map(|name| name.strip_prefix(prefix)?.strip_suffix(".pt")?.parse().ok())
            .collect();
        gpus.sort_unstable();
        if let Some(missing) = gpus.iter().zip(0u32..).find(|(gpu, place)| *gpu != place) {
            let missing = folder.join(format!("{prefix}{}.pt", missing.1));
            return Err(refuse(format!(
                "{}: no such file, but there are later ones",
                missing.display()
            )));
        }
        if !gpus.is_empty() {
            let path = |gpu: &u32| folder.join(format!("{prefix}{gpu}.pt"));
            return Ok(gpus.iter().map(path).collect());
        }
    }
    Err(
        refuse(format!("{}: no head in it", folder.display())).hint(format!(
            "a checkpoint has a {}, the reference's folder {}0.pt or {}0.pt",
            crate::checkpoint::manifest::FILE,
            REFERENCE[0],
            REFERENCE[1]
        )),
    )
}

/// The rows of one file, whose first belongs to class `first`.
fn open_file(path: &Path, first: u32) -> Result<MappedRows, RankFailure> {
    let map = MappedFile::open(path, Access::Random).map_err(|error| DataError::io(path, error))?;
    let malformed = |what: String| refuse(FileError::malformed(path, what));
    let (shape, dtype, start) = match header::looks_like(&map) {
        true => in_safetensors(&map),
        false => in_pytorch(&map),
    }
    .map_err(malformed)?;
    let kind = kind_of(dtype).filter(|kind| is_float(*kind));
    let kind =
        kind.ok_or_else(|| malformed(format!("tensor {WEIGHT}: its kind is {dtype}, expected a float")))?;
    let rows = shape.first().and_then(|&rows| u32::try_from(rows).ok());
    let hi = rows.and_then(|rows| first.checked_add(rows));
    let hi = hi.ok_or_else(|| malformed(format!("tensor {WEIGHT}: shape {shape:?} is not a row a class")))?;
    Ok(MappedRows {
        path: path.to_owned(),
        start,
        kind,
        row_shape: shape[1..].to_vec(),
        classes: ClassRange { lo: first, hi },
        map,
    })
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}

/// Shape, kind and first byte of the weights.
type Found = (Vec<i64>, ::safetensors::Dtype, usize);

fn in_safetensors(file: &[u8]) -> Result<Found, String> {
    let header = header::read(file, file.len() as u64)?;
    let weight = header.tensors.into_iter().find(|tensor| tensor.name == WEIGHT);
    let weight = weight.ok_or_else(|| format!("no tensor {WEIGHT}"))?;
    Ok((weight.shape, weight.dtype, header.data + weight.start))
}

fn in_pytorch(file: &[u8]) -> Result<Found, String> {
    let described = state_dict::read(file, &state_dict::HEAD).map_err(|refused| refused.what)?;
    let (_, view) = described
        .tensors
        .iter()
        .find(|(name, _)| name == WEIGHT)
        .ok_or_else(|| format!("no tensor {WEIGHT}"))?;
    if !view.is_contiguous() {
        return Err(format!(
            "tensor {WEIGHT}: its rows do not lie one after the other"
        ));
    }
    let storage = described.storages[view.storage];
    let width = storage.dtype.bitsize() / 8;
    // A storage is a piece of the file.
    let start = storage.bytes.as_ptr() as usize - file.as_ptr() as usize + view.offset as usize * width;
    Ok((view.size.clone(), storage.dtype, start))
}

/// The part of a run that lies in `held`: first row there, first row in the new shard, how many.
fn part_of(run: Run, held: ClassRange) -> Option<(u32, u32, u32)> {
    let lo = run.from.max(held.lo);
    let hi = (run.from + run.len).min(held.hi);
    (lo < hi).then(|| (lo - held.lo, run.at + (lo - run.from), hi - lo))
}

fn copy_from(rows: &MappedRows, runs: &[Run], weight: &Tensor) -> Result<(), RankFailure> {
    let parts: Vec<_> = runs
        .iter()
        .filter_map(|run| part_of(*run, rows.classes))
        .collect();
    if parts.is_empty() {
        return Ok(());
    }
    let shape = weight.size();
    if rows.row_shape != shape[1..] || !is_float(rows.kind) {
        let of = |shape: &[i64]| match shape {
            [d] => format!("{d} numbers"),
            [k, d] => format!("{k} centres of {d} numbers"),
            shape => format!("shape {shape:?}"),
        };
        return Err(refuse(format!(
            "{}: a class has {} of kind {:?} there, and {} in this job",
            rows.path.display(),
            of(&rows.row_shape),
            rows.kind,
            of(&shape[1..])
        ))
        .hint("model.embedding_size, head.loss and head.subcenter.k must be those of the old head"));
    }
    let row_bytes = shape[1..].iter().product::<i64>() as usize * rows.kind.elt_size_in_bytes();
    let most = (CHUNK / row_bytes.max(1)).max(1) as u32;
    for (from, at, len) in parts {
        for first in (0..len).step_by(most as usize) {
            let count = most.min(len - first);
            let start = rows.start + (from + first) as usize * row_bytes;
            // The reader of the file saw that all rows are in it.
            let bytes = &rows.map[start..start + count as usize * row_bytes];
            let mut size = shape.clone();
            size[0] = count.into();
            let values = Tensor::f_from_data_size(bytes, &size, rows.kind);
            tch::no_grad(|| {
                weight
                    .narrow(0, (at + first).into(), count.into())
                    .f_copy_(&values?)
            })
            .map_err(|error| refuse(format!("{}: {error}", rows.path.display())))?;
        }
    }
    Ok(())
}
