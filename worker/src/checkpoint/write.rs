//! Writing parts so that a crash at any moment leaves either no part or a whole one.

use super::{
    CheckpointError, NamedTensor, PartKind,
    layout::{self, CHUNK},
    manifest,
};
use arcface_proto::v1::{CheckpointManifest, CheckpointPart};
use safetensors::Dtype;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};
use tch::{Device, Tensor};

/// Copies tensors to the CPU, detached from training: what [`write_part`] may write on another thread while
/// training goes on.
pub fn snapshot(tensors: &[(&str, &Tensor)]) -> Vec<NamedTensor> {
    tch::no_grad(|| {
        let copy = |tensor: &Tensor| tensor.detach().to_device(Device::Cpu).copy();
        tensors
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), copy(tensor)))
            .collect()
    })
}

/// Writes one part into `dir`, which is made if it is missing: temporary name, sync, rename, sync of the directory.
/// When this returns the part is durable, and described by the result. On an error the temporary file is removed;
/// an older part of the same name stays.
///
/// Tensors of a head part have a row for each class or no dimension, see [`PartKind`].
pub fn write_part(
    dir: &Path,
    kind: PartKind,
    tensors: &[NamedTensor],
) -> Result<CheckpointPart, CheckpointError> {
    let file = kind.file();
    let tensors = check(&file, kind, tensors)?;
    let classes = kind.classes();
    let metadata = HashMap::from([("format".to_owned(), "arcface-checkpoint-1".to_owned())]);
    let path = dir.join(&file);
    let header =
        layout::header(&tensors, metadata).map_err(|detail| CheckpointError::layout(&path, detail))?;
    let data: usize = tensors
        .iter()
        .map(|(_, t, dtype)| t.numel() * dtype.bitsize() / 8)
        .sum();
    let bytes = header.len() as u64 + data as u64;

    make_dir(dir)?;
    let mut hasher = blake3::Hasher::new();
    replace(&path, bytes, |out| {
        let mut put = |chunk: &[u8]| {
            hasher.update(chunk);
            out.write_all(chunk)
                .map_err(CheckpointError::io("write", &path, bytes))
        };
        put(&header)?;
        let mut buffer = Vec::new();
        for (name, tensor, dtype) in &tensors {
            copy_out(tensor, *dtype, &mut buffer, &mut put).map_err(|error| match error {
                CopyError::Sink(error) => error,
                CopyError::Torch(error) => CheckpointError::Tensor {
                    file: file.clone(),
                    name: (*name).to_owned(),
                    detail: error.to_string(),
                },
            })?;
        }
        Ok(())
    })?;
    Ok(CheckpointPart {
        file,
        bytes,
        blake3: hasher.finalize().to_hex().to_string(),
        class_lo: classes.lo,
        class_hi: classes.hi,
    })
}

/// Writes `dir/manifest.json`, all or nothing.
pub fn write_manifest(dir: &Path, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
    let path = dir.join(manifest::FILE);
    let text =
        manifest::to_json(manifest).map_err(|error| CheckpointError::layout(&path, error.to_string()))?;
    let bytes = text.len() as u64;
    replace(&path, bytes, |out| {
        out.write_all(&text)
            .map_err(CheckpointError::io("write", &path, bytes))
    })
}

/// Removes one checkpoint of a job: the manifest first, so that what a crash leaves is no checkpoint. `directory` is
/// relative to `output`; a path that leads elsewhere is refused. One that is gone already is no error.
pub fn remove(output: &Path, directory: &str) -> Result<(), CheckpointError> {
    let inside = |part| matches!(part, std::path::Component::Normal(_));
    let path = output.join(directory);
    if directory.is_empty() || !Path::new(directory).components().all(inside) {
        return Err(CheckpointError::layout(
            &path,
            "a checkpoint's directory is relative, without \"..\"",
        ));
    }
    for result in [
        fs::remove_file(path.join(manifest::FILE)),
        fs::remove_dir_all(&path),
    ] {
        match result {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(CheckpointError::io("remove", &path, 0)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The tensors with their stored kinds, widest first so that each is aligned in the file.
fn check<'t>(
    file: &str,
    kind: PartKind,
    tensors: &'t [NamedTensor],
) -> Result<Vec<(&'t str, &'t Tensor, Dtype)>, CheckpointError> {
    let refuse = |name: &str, detail: String| CheckpointError::Tensor {
        file: file.to_owned(),
        name: name.to_owned(),
        detail,
    };
    let mut names = HashSet::new();
    let mut out = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if !names.insert(name) || name == "__metadata__" {
            return Err(refuse(name, "the name is taken".into()));
        }
        let dtype = layout::dtype_of(tensor.kind());
        let dtype = dtype.ok_or_else(|| refuse(name, format!("kind {:?} is not stored", tensor.kind())))?;
        let rows = tensor.size().first().copied();
        if let (PartKind::Head(classes), Some(rows)) = (kind, rows)
            && rows != i64::from(classes.len())
        {
            let detail = format!(
                "{rows} rows for {} classes; a value that all shards share has shape []",
                classes.len()
            );
            return Err(refuse(name, detail));
        }
        out.push((name.as_str(), tensor, dtype));
    }
    out.sort_by_key(|(_, _, dtype)| std::cmp::Reverse(dtype.bitsize()));
    Ok(out)
}

enum CopyError {
    Sink(CheckpointError),
    Torch(tch::TchError),
}

/// The tensor's bytes, row-major, in chunks.
fn copy_out(
    tensor: &Tensor,
    dtype: Dtype,
    buffer: &mut Vec<u8>,
    put: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<(), CopyError> {
    let size = dtype.bitsize() / 8;
    let flat = tensor
        .f_detach()
        .and_then(|t| t.f_contiguous())
        .and_then(|t| t.f_view([-1]));
    let flat = flat.map_err(CopyError::Torch)?;
    let total = flat.numel();
    let step = CHUNK / size;
    for first in (0..total).step_by(step) {
        let count = step.min(total - first);
        buffer.resize(count * size, 0);
        let part = flat
            .f_narrow(0, first as i64, count as i64)
            .map_err(CopyError::Torch)?;
        part.f_copy_data_u8(buffer, count).map_err(CopyError::Torch)?;
        put(buffer).map_err(CopyError::Sink)?;
    }
    Ok(())
}

/// Makes `dir` and its parents, durable up to the last one that was there.
fn make_dir(dir: &Path) -> Result<(), CheckpointError> {
    let missing: Vec<&Path> = dir
        .ancestors()
        .take_while(|d| !d.as_os_str().is_empty() && !d.exists())
        .collect();
    fs::create_dir_all(dir).map_err(CheckpointError::io("make directory", dir, 0))?;
    missing
        .iter()
        .filter_map(|made| made.parent())
        .try_for_each(sync_dir)
}

fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    let dir = if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    };
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(CheckpointError::io("sync directory", dir, 0))
}

/// A file that is removed unless it is kept.
struct Temporary {
    path: PathBuf,
    kept: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing can be done about a failure here, and the first error is on its way already.
            drop(fs::remove_file(&self.path));
        }
    }
}

/// Makes or replaces `path` by what `fill` writes, all or nothing. `bytes` is for messages.
pub(super) fn replace(
    path: &Path,
    bytes: u64,
    fill: impl FnOnce(&mut File) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    static UNIQUE: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unique = UNIQUE.fetch_add(1, Ordering::Relaxed);
    // Ranks of several hosts may share the directory: the process id alone would not be unique, create_new is.
    let mut temporary = Temporary {
        path: path.with_file_name(format!(".{name}.{}-{unique}.tmp", std::process::id())),
        kept: false,
    };
    let failed = |operation| CheckpointError::io(operation, path, bytes);
    let created = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&temporary.path);
    let mut out = match created {
        // Left by a process of the same id that was killed.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            fs::remove_file(&temporary.path).map_err(failed("remove old temporary file of"))?;
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&temporary.path)
        }
        created => created,
    }
    .map_err(failed("create"))?;
    fill(&mut out)?;
    // A failed sync may have dropped the data: it is not tried again on this file.
    out.sync_all().map_err(failed("sync"))?;
    drop(out);
    fs::rename(&temporary.path, path).map_err(failed("rename"))?;
    temporary.kept = true;
    sync_dir(path.parent().unwrap_or(Path::new("")))
}
