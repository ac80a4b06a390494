//! Writing parts so that a crash at any moment leaves either no part or a whole one.
//!
//! A part is written to a temporary name, synced, renamed, its directory synced, and then read again from the disk and
//! compared with the digest of what was meant: a rank asks for the commit only of what it has seen come back. So an older
//! checkpoint, which is removed after the commit, never goes before the new one was read once.

use super::{
    CHUNK, CheckpointError, NamedTensor, PartKind,
    digest::{self, Chunk, Ring},
    disk::{Disk, Real},
    manifest,
};
use crate::export::{self, safetensors::header};
use arcface_proto::v1::{CheckpointManifest, CheckpointPart};
use safetensors::Dtype;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};
use tch::{Device, Tensor};

/// Copies tensors to the CPU, detached from training: what [`write_part`] may write on another thread while
/// training goes on. The memory of `old` is used again where a tensor of the same shape and kind is at the same place.
pub fn snapshot(tensors: &[(&str, &Tensor)], old: Vec<NamedTensor>) -> Vec<NamedTensor> {
    let mut old = old.into_iter();
    tch::no_grad(|| {
        tensors
            .iter()
            .map(|(name, tensor)| {
                let fits = |old: &Tensor| old.size() == tensor.size() && old.kind() == tensor.kind();
                let copy = match old.next() {
                    Some((_, mut copy)) if fits(&copy) => {
                        copy.copy_(tensor);
                        copy
                    }
                    _ if tensor.device() == Device::Cpu => tensor.detach().copy(),
                    _ => tensor.detach().to_device(Device::Cpu),
                };
                ((*name).to_owned(), copy)
            })
            .collect()
    })
}

/// Writes one part into `dir`, which is made if it is missing. When this returns the part is durable, was read again, and
/// is described by the result. On an error the temporary file is removed; an older part of the same name stays.
///
/// Tensors of a head part have a row for each class or no dimension, see [`PartKind`]. Numbers that are not finite are
/// refused: nothing resumes from them.
pub fn write_part(
    dir: &Path,
    kind: PartKind,
    tensors: &[NamedTensor],
) -> Result<CheckpointPart, CheckpointError> {
    write_part_on(&Real, dir, kind, tensors, &|| {})
}

/// The same; `alive` is called as bytes go out and come back.
pub(super) fn write_part_on(
    disk: &dyn Disk,
    dir: &Path,
    kind: PartKind,
    tensors: &[NamedTensor],
    alive: &dyn Fn(),
) -> Result<CheckpointPart, CheckpointError> {
    let part = Encoding::new(dir, kind, tensors)?;
    let path = dir.join(&part.file);
    let bytes = part.bytes;
    make_dir(disk, dir)?;
    let mut digest = String::new();
    replace(disk, &path, bytes, |out| {
        digest = part.write(&mut |chunk| {
            alive();
            disk.write(out, chunk)
                .map_err(CheckpointError::io("write", &path, bytes))
        })?;
        Ok(())
    })?;
    let part = part.described(digest);
    read_again(disk, &path, &part, alive)?;
    Ok(part)
}

/// A part on its way to wherever it is kept: its header is made, its size is known.
pub(super) struct Encoding<'t> {
    /// Name of its file.
    pub file: String,
    /// Size of the file.
    pub bytes: u64,
    kind: PartKind,
    tensors: Vec<(&'t str, &'t Tensor, Dtype)>,
    header: Vec<u8>,
}

impl<'t> Encoding<'t> {
    /// Checks names, kinds and shapes. `dir` is for messages.
    pub fn new(dir: &Path, kind: PartKind, tensors: &'t [NamedTensor]) -> Result<Self, CheckpointError> {
        let file = kind.file();
        let tensors = check(&file, kind, tensors)?;
        let metadata = HashMap::from([("format".to_owned(), "arcface-checkpoint-1".to_owned())]);
        let described = tensors.iter().map(|(name, tensor, dtype)| {
            let shape = tensor.size().iter().map(|&n| n as usize).collect();
            ((*name).to_owned(), shape, *dtype)
        });
        let header = header::write(described, metadata)
            .map_err(|detail| CheckpointError::layout(&dir.join(&file), detail))?;
        let data: usize = tensors
            .iter()
            .map(|(_, t, dtype)| t.numel() * dtype.bitsize() / 8)
            .sum();
        Ok(Self {
            bytes: header.len() as u64 + data as u64,
            file,
            kind,
            tensors,
            header,
        })
    }

    /// Gives the bytes to `sink`, [`CHUNK`] at most at a time; the result is their digest.
    pub fn write(
        &self,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<String, CheckpointError> {
        let (written, digest) = digest::beside(|give| {
            let mut ring = Ring::default();
            let mut put = |chunk: Chunk| {
                give(chunk.clone());
                sink(chunk.as_ref())
            };
            for header in self.header.chunks(CHUNK) {
                put(ring.fill(header.len(), |bytes| {
                    bytes.copy_from_slice(header);
                    Ok(())
                })?)?;
            }
            for (name, tensor, dtype) in &self.tensors {
                let refuse = |detail: String| CheckpointError::Tensor {
                    file: self.file.clone(),
                    name: (*name).to_owned(),
                    detail,
                };
                copy_out(tensor, *dtype, &mut ring, &mut put).map_err(|error| match error {
                    CopyError::Sink(error) => error,
                    CopyError::Torch(error) => refuse(error.to_string()),
                    CopyError::NotFinite => refuse("a number in it is not finite".into()),
                })?;
            }
            Ok(())
        });
        written.map(|()| digest)
    }

    /// What the manifest says of it.
    pub fn described(self, blake3: String) -> CheckpointPart {
        let classes = self.kind.classes();
        CheckpointPart {
            file: self.file,
            bytes: self.bytes,
            blake3,
            class_lo: classes.lo,
            class_hi: classes.hi,
        }
    }
}

/// Compares a part, as the disk gives it back, with what was meant. One that is not the same is removed: it would only
/// take room.
fn read_again(
    disk: &dyn Disk,
    path: &Path,
    part: &CheckpointPart,
    alive: &dyn Fn(),
) -> Result<(), CheckpointError> {
    let read = disk
        .reopen(path)
        .and_then(|file| digest::of_all(&mut Shown { file, alive }));
    let got = read.map_err(CheckpointError::io("read again", path, part.bytes))?;
    if got == part.blake3 {
        return Ok(());
    }
    // Nothing can be done about a failure here, and the first error is on its way already.
    drop(disk.remove_file(path));
    Err(CheckpointError::Digest {
        path: path.to_owned(),
        zeros: None,
        expected: part.blake3.clone(),
        got,
    })
}

/// A file whose reader is told that bytes come.
struct Shown<'a> {
    file: File,
    alive: &'a dyn Fn(),
}

impl Read for Shown<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (self.alive)();
        self.file.read(buffer)
    }
}

/// Writes `dir/manifest.json`, all or nothing.
pub fn write_manifest(dir: &Path, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
    write_manifest_on(&Real, dir, manifest)
}

pub(super) fn write_manifest_on(
    disk: &dyn Disk,
    dir: &Path,
    manifest: &CheckpointManifest,
) -> Result<(), CheckpointError> {
    let path = dir.join(manifest::FILE);
    let text =
        manifest::to_json(manifest).map_err(|error| CheckpointError::layout(&path, error.to_string()))?;
    let bytes = text.len() as u64;
    replace(disk, &path, bytes, |out| {
        disk.write(out, &text)
            .map_err(CheckpointError::io("write", &path, bytes))
    })
}

/// Removes one checkpoint of a job: the manifest first, so that what a crash leaves is no checkpoint. `directory` is
/// relative to `output`; a path that leads elsewhere is refused. One that is gone already is no error.
pub fn remove(output: &Path, directory: &str) -> Result<(), CheckpointError> {
    remove_on(&Real, output, directory)
}

pub(super) fn remove_on(disk: &dyn Disk, output: &Path, directory: &str) -> Result<(), CheckpointError> {
    let inside = |part| matches!(part, std::path::Component::Normal(_));
    let path = output.join(directory);
    if directory.is_empty() || !Path::new(directory).components().all(inside) {
        return Err(CheckpointError::layout(
            &path,
            "a checkpoint's directory is relative, without \"..\"",
        ));
    }
    let gone_is_fine = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CheckpointError::io("remove", &path, 0)(error))
        }
        _ => Ok(()),
    };
    gone_is_fine(disk.remove_file(&path.join(manifest::FILE)))?;
    // Durable before the first part goes: a manifest that comes back after a crash must not find some of them gone.
    gone_is_fine(disk.sync_dir(&path))?;
    gone_is_fine(disk.remove_dir_all(&path))
}

/// Names of the directories in `dir`.
pub fn names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    let mut look = || -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string().ok());
            }
        }
        Ok(())
    };
    look().map_err(CheckpointError::io("list", dir, 0))?;
    Ok(names)
}

/// The manifest in `dir`; none if there is no file.
pub fn manifest_of(dir: &Path) -> Result<Option<CheckpointManifest>, CheckpointError> {
    match dir.join(manifest::FILE).try_exists() {
        Ok(false) => Ok(None),
        Ok(true) => manifest::read_manifest(dir).map(Some),
        Err(error) => Err(CheckpointError::io("look for", &dir.join(manifest::FILE), 0)(
            error,
        )),
    }
}

/// Makes `dir` and its parents; the names of the last three are durable then, whoever made them. A parent that cannot be opened is not ours.
pub fn make_place(dir: &Path) -> Result<(), CheckpointError> {
    make_dir(&Real, dir)?;
    for parent in dir.ancestors().skip(1).take(3) {
        sync_dir(&Real, parent).unwrap_or_default();
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
        let dtype = export::dtype_of(tensor.kind());
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

/// True unless an f32, the kind of all weights and buffers, is infinite or no number. All of its exponent's bits are set then.
fn is_finite(bytes: &[u8], dtype: Dtype) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    dtype != Dtype::F32
        || bytes.as_chunks().0.iter().fold(true, |finite, bits| {
            finite & (u32::from_le_bytes(*bits) & EXPONENT != EXPONENT)
        })
}

enum CopyError {
    NotFinite,
    Sink(CheckpointError),
    Torch(tch::TchError),
}

/// The tensor's bytes, row-major, in chunks.
fn copy_out(
    tensor: &Tensor,
    dtype: Dtype,
    ring: &mut Ring,
    put: &mut dyn FnMut(Chunk) -> Result<(), CheckpointError>,
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
        let part = flat
            .f_narrow(0, first as i64, count as i64)
            .map_err(CopyError::Torch)?;
        let chunk = ring.fill(count * size, |bytes| {
            part.f_copy_data_u8(bytes, count).map_err(CopyError::Torch)?;
            match is_finite(bytes, dtype) {
                true => Ok(()),
                false => Err(CopyError::NotFinite),
            }
        })?;
        put(chunk).map_err(CopyError::Sink)?;
    }
    Ok(())
}

/// Makes `dir` and its parents, durable up to the last one that was there.
fn make_dir(disk: &dyn Disk, dir: &Path) -> Result<(), CheckpointError> {
    let mut missing: Vec<&Path> = dir
        .ancestors()
        .take_while(|d| !d.as_os_str().is_empty() && !d.exists())
        .collect();
    missing.reverse();
    for made in missing {
        disk.make_dir(made)
            .map_err(CheckpointError::io("make directory", made, 0))?;
        sync_dir(disk, made.parent().unwrap_or(Path::new("")))?;
    }
    Ok(())
}

fn sync_dir(disk: &dyn Disk, dir: &Path) -> Result<(), CheckpointError> {
    let dir = if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    };
    disk.sync_dir(dir)
        .map_err(CheckpointError::io("sync directory", dir, 0))
}

/// A file that is removed unless it is kept.
struct Temporary<'d> {
    disk: &'d dyn Disk,
    path: PathBuf,
    kept: bool,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing can be done about a failure here, and the first error is on its way already.
            drop(self.disk.remove_file(&self.path));
        }
    }
}

/// Makes or replaces `path` by what `fill` writes, all or nothing. `bytes` is for messages.
pub(super) fn replace(
    disk: &dyn Disk,
    path: &Path,
    bytes: u64,
    fill: impl FnOnce(&mut File) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    static UNIQUE: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unique = UNIQUE.fetch_add(1, Ordering::Relaxed);
    // Ranks of several hosts may share the directory: the process id alone would not be unique, `create` is.
    let mut temporary = Temporary {
        disk,
        path: path.with_file_name(format!(".{name}.{}-{unique}.tmp", std::process::id())),
        kept: false,
    };
    let failed = |operation| CheckpointError::io(operation, path, bytes);
    let created = match disk.create(&temporary.path) {
        // Left by a process of the same id that was killed.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            disk.remove_file(&temporary.path)
                .map_err(failed("remove old temporary file of"))?;
            disk.create(&temporary.path)
        }
        created => created,
    };
    let mut out = created.map_err(failed("create"))?;
    fill(&mut out)?;
    // A failed sync may have dropped the data: it is not tried again on this file.
    disk.sync(&out).map_err(failed("sync"))?;
    drop(out);
    disk.rename(&temporary.path, path).map_err(failed("rename"))?;
    temporary.kept = true;
    sync_dir(disk, path.parent().unwrap_or(Path::new("")))
}
