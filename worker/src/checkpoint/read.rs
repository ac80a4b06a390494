//! Reading a checkpoint at any world size. Nothing of a part reaches the caller before the part's size and digest
//! were compared with the manifest.
//!
//! Cost: a part that a rank wants whole, its own at the old world size, is read once, into the memory that its tensors then
//! have, and hashed meanwhile. Of parts that its classes overlap at another world size, all bytes are read to hash them, and those that it
//! wants again, from the page cache.

use super::{CHUNK, CheckpointError, NamedTensor, PartKind, TrainState, digest, manifest, reshard};
use crate::data::{Access, MappedFile};
use crate::export::{self, safetensors::header};
use crate::slices;
use arcface_proto::{
    types::ClassRange,
    v1::{CheckpointManifest, CheckpointPart},
};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tch::{Device, Kind, Tensor};

/// Zero bytes at the end of a part that are worth a word: a block of a disk.
const BLOCK: u64 = 4096;

/// A committed checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: CheckpointManifest,
    /// Parts that were found to be what was committed, by file.
    proven: Mutex<HashMap<String, Proven>>,
}

/// A part that was found to be what was committed. A file that is replaced meanwhile changes nothing.
#[derive(Debug)]
enum Proven {
    /// It is still open, to be read from.
    Open(Arc<Part>),
    /// All of it was read; for the first who asks.
    Read(Vec<NamedTensor>),
}

impl Checkpoint {
    /// The checkpoint in `dir` that `manifest`, as committed, describes. Checks the manifest, and that every part is
    /// there in its full size.
    pub fn open(dir: &Path, manifest: CheckpointManifest) -> Result<Self, CheckpointError> {
        manifest::validate(dir, &manifest)?;
        let checkpoint = Self {
            dir: dir.to_owned(),
            manifest,
            proven: Mutex::default(),
        };
        for part in &checkpoint.manifest.parts {
            checkpoint.open_part(part)?;
        }
        Ok(checkpoint)
    }

    /// The committed checkpoint that `manifest` describes, for a rank with these classes: `fetch` gives the parts that it
    /// needs, as files from anywhere, and they are verified as by [`Self::verify_for`]. `dir` is its name in messages.
    pub fn fetched(
        dir: &Path,
        manifest: CheckpointManifest,
        classes: ClassRange,
        fetch: &mut dyn FnMut(&CheckpointPart) -> Result<File, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        manifest::validate(dir, &manifest)?;
        let mut proven = HashMap::new();
        let checkpoint = Self {
            dir: dir.to_owned(),
            manifest,
            proven: Mutex::default(),
        };
        for part in checkpoint.needed(classes)? {
            let file = fetch(part)?;
            let mut found =
                prove_file(dir.join(&part.file), file, part).map_err(CheckpointError::of_scratch)?;
            found.is_scratch = true;
            proven.insert(part.file.clone(), Proven::Open(Arc::new(found)));
        }
        Ok(Self {
            proven: Mutex::new(proven),
            ..checkpoint
        })
    }

    /// The checkpoint in `dir` by its own `manifest.json`.
    pub fn open_dir(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open(dir, manifest::read_manifest(dir)?)
    }

    /// The manifest.
    pub fn manifest(&self) -> &CheckpointManifest {
        &self.manifest
    }

    /// Where training stands.
    pub fn train_state(&self) -> TrainState {
        TrainState::from(&self.manifest)
    }

    /// Checks size and digest of every part.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        self.manifest
            .parts
            .iter()
            .try_for_each(|part| self.prove(part).map(drop))
    }

    /// Checks size and digest of what a rank with these classes will read. What it will read whole it has read then; the other parts stay
    /// open and are not hashed again.
    pub fn verify_for(&self, classes: ClassRange) -> Result<(), CheckpointError> {
        let head = self.whole_head(classes)?.map(|part| &part.file);
        let backbone = &self.backbone_part()?.file;
        for part in self.needed(classes)? {
            if part.file != *backbone && Some(&part.file) != head {
                self.verified(part)?;
            } else if let Some(tensors) = self.whole(part)? {
                self.proven().insert(part.file.clone(), Proven::Read(tensors));
            }
        }
        Ok(())
    }

    /// The part of the head that has these classes and no others.
    fn whole_head(&self, classes: ClassRange) -> Result<Option<&CheckpointPart>, CheckpointError> {
        let all = self.head_parts();
        Ok(match &self.pieces(classes, &all)?[..] {
            [piece] => Some(all[piece.part]).filter(|(_, held)| *held == classes),
            _ => None,
        }
        .map(|(part, _)| part))
    }

    fn proven(&self) -> MutexGuard<'_, HashMap<String, Proven>> {
        // Nothing that is done with it leaves it half changed.
        self.proven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parts that a rank with these classes reads.
    fn needed(&self, classes: ClassRange) -> Result<Vec<&CheckpointPart>, CheckpointError> {
        let backbone = self.backbone_part()?;
        let heads = self.head_parts();
        let pieces = self.pieces(classes, &heads)?;
        // A rank without classes reads the names of the tensors in the first.
        let first = heads.first().filter(|_| pieces.is_empty());
        let wanted = pieces.iter().map(|piece| &heads[piece.part]).chain(first);
        Ok([backbone]
            .into_iter()
            .chain(wanted.map(|(part, _)| *part))
            .collect())
    }

    /// The backbone part's tensors, on the CPU, in the order of the file.
    pub fn backbone(&self) -> Result<Vec<NamedTensor>, CheckpointError> {
        let part = self.backbone_part()?;
        if let Some(tensors) = self.whole(part)? {
            return Ok(tensors);
        }
        let part = self.verified(part)?;
        part.tensors
            .iter()
            .map(|stored| {
                let tensor = part.allocate(stored, &stored.shape)?;
                part.copy_in(stored, stored.start, stored.len, &tensor.view([-1]))?;
                Ok((stored.name.clone(), tensor))
            })
            .collect()
    }

    fn backbone_part(&self) -> Result<&CheckpointPart, CheckpointError> {
        let mut parts = self.manifest.parts.iter();
        parts
            .find(|part| manifest::kind(part) == Some(PartKind::Backbone))
            .ok_or_else(|| CheckpointError::layout(&self.dir, "no backbone part"))
    }

    fn head_parts(&self) -> Vec<(&CheckpointPart, ClassRange)> {
        self.manifest
            .parts
            .iter()
            .filter_map(|part| match manifest::kind(part) {
                Some(PartKind::Head(classes)) => Some((part, classes)),
                _ => None,
            })
            .collect()
    }

    fn pieces(
        &self,
        classes: ClassRange,
        heads: &[(&CheckpointPart, ClassRange)],
    ) -> Result<Vec<reshard::Piece>, CheckpointError> {
        let ranges: Vec<ClassRange> = heads.iter().map(|(_, classes)| *classes).collect();
        reshard::pieces(classes, &ranges)
            .map_err(|error| CheckpointError::layout(&self.dir, format!("head rows {classes}: {error}")))
    }

    /// Rows `classes` of every tensor of the head, on the CPU, whatever the old shards were; tensors without a
    /// dimension as they are in every part. Reads only the bytes of those rows, after the digests were checked.
    pub fn head_rows(&self, classes: ClassRange) -> Result<Vec<NamedTensor>, CheckpointError> {
        if let Some(part) = self.whole_head(classes)?
            && let Some(tensors) = self.whole(part)?
        {
            let has_rows = |tensor: &Tensor| {
                let rows = tensor.size().first().copied();
                rows.is_none_or(|rows| rows == i64::from(classes.len()))
            };
            return match tensors.iter().find(|(_, tensor)| !has_rows(tensor)) {
                None => Ok(tensors),
                Some((name, tensor)) => Err(CheckpointError::layout(
                    &self.dir.join(&part.file),
                    format!("tensor {name}: {:?} for {} classes", tensor.size(), classes.len()),
                )),
            };
        }

        let all = self.head_parts();
        let pieces = self.pieces(classes, &all)?;
        // A rank without classes still gets every tensor, with no rows.
        let first = pieces.first().map_or(0, |piece| piece.part);
        let Some((first, _)) = all.get(first) else {
            return Err(CheckpointError::layout(&self.dir, "no head part"));
        };
        let first = self.verified(first)?;
        let names = &first.tensors;
        let mut out = Vec::with_capacity(names.len());
        for stored in names {
            let mut shape = stored.shape.clone();
            match shape.first_mut() {
                Some(rows) => *rows = classes.len().into(),
                None => {
                    let tensor = first.allocate(stored, &shape)?;
                    first.copy_in(stored, stored.start, stored.len, &tensor.view([-1]))?;
                    out.push((stored.name.clone(), tensor));
                    continue;
                }
            }
            out.push((stored.name.clone(), first.allocate(stored, &shape)?));
        }
        for piece in &pieces {
            let (part, held) = all[piece.part];
            let part = self.verified(part)?;
            for (stored, (_, tensor)) in names.iter().zip(&out) {
                part.copy_rows(stored, held, piece, tensor)?;
            }
        }
        Ok(out)
    }

    /// Tensor `name` of the head, mapped, from every part with a class for which `wanted` says so, in the manifest's
    /// order: for those who take rows in another order than the classes'. Digests were checked.
    pub fn head_tensor(
        &self,
        name: &str,
        wanted: &dyn Fn(ClassRange) -> bool,
    ) -> Result<Vec<MappedRows>, CheckpointError> {
        let parts = self.head_parts().into_iter();
        parts
            .filter(|(_, classes)| !classes.is_empty() && wanted(*classes))
            .map(|(part, classes)| {
                let (path, _) = self.open_part(part)?;
                let failed = CheckpointError::io("map", &path, part.bytes);
                let map = MappedFile::open(&path, Access::Sequential).map_err(failed)?;
                let got = blake3::hash(&map).to_hex().to_string();
                if !got.eq_ignore_ascii_case(&part.blake3) {
                    return Err(CheckpointError::Digest {
                        zeros: zeros_at_end(
                            &mut |bytes, at| {
                                bytes.copy_from_slice(&map[at as usize..][..bytes.len()]);
                                Ok(())
                            },
                            part.bytes,
                        ),
                        path,
                        expected: part.blake3.clone(),
                        got,
                    });
                }
                let refuse = |detail: String| CheckpointError::layout(&path, detail);
                let stored = stored(&map, part.bytes)
                    .map_err(refuse)?
                    .into_iter()
                    .find(|stored| stored.name == name)
                    .ok_or_else(|| refuse(format!("tensor {name}: is missing")))?;
                if stored.shape.first() != Some(&i64::from(classes.len())) {
                    let detail = format!("tensor {name}: {:?} for {} classes", stored.shape, classes.len());
                    return Err(refuse(detail));
                }
                Ok(MappedRows {
                    classes,
                    kind: stored.kind,
                    row_shape: stored.shape[1..].to_vec(),
                    start: stored.start as usize,
                    map,
                    path,
                })
            })
            .collect()
    }

    fn open_part(&self, part: &CheckpointPart) -> Result<(PathBuf, File), CheckpointError> {
        let path = self.dir.join(&part.file);
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (got, file) = opened.map_err(CheckpointError::io("open", &path, part.bytes))?;
        if got != part.bytes {
            return Err(CheckpointError::Size {
                path,
                expected: part.bytes,
                got,
            });
        }
        Ok((path, file))
    }

    /// All tensors of a part; `None` of one that is open.
    fn whole(&self, part: &CheckpointPart) -> Result<Option<Vec<NamedTensor>>, CheckpointError> {
        let mut proven = self.proven();
        match proven.remove(&part.file) {
            Some(Proven::Read(tensors)) => return Ok(Some(tensors)),
            Some(open @ Proven::Open(_)) => {
                proven.insert(part.file.clone(), open);
                return Ok(None);
            }
            None => drop(proven),
        }
        let (path, file) = self.open_part(part)?;
        read_whole(&path, file, part).map(Some)
    }

    /// A part that is what was committed, open.
    fn verified(&self, part: &CheckpointPart) -> Result<Arc<Part>, CheckpointError> {
        if let Some(Proven::Open(part)) = self.proven().get(&part.file) {
            return Ok(part.clone());
        }
        let found = Arc::new(self.prove(part)?);
        let proven = Proven::Open(found.clone());
        self.proven().insert(part.file.clone(), proven);
        Ok(found)
    }

    /// Opens a part and compares it with the manifest.
    fn prove(&self, part: &CheckpointPart) -> Result<Part, CheckpointError> {
        let (path, file) = self.open_part(part)?;
        prove_file(path, file, part)
    }
}

/// Compares a part with the manifest and reads its header: from the same open file, so that a part that is replaced
/// meanwhile changes nothing.
fn prove_file(path: PathBuf, mut file: File, part: &CheckpointPart) -> Result<Part, CheckpointError> {
    let failed = CheckpointError::io("read", &path, part.bytes);
    let got = digest::of_all(&mut file.by_ref().take(part.bytes)).map_err(&failed)?;
    if !got.eq_ignore_ascii_case(&part.blake3) {
        return Err(CheckpointError::Digest {
            zeros: zeros_at_end(&mut |bytes, at| file.read_exact_at(bytes, at), part.bytes),
            path,
            expected: part.blake3.clone(),
            got,
        });
    }
    let mut start = vec![0; part.bytes.min(8) as usize];
    file.read_exact_at(&mut start, 0).map_err(&failed)?;
    if let Some(length) = start.first_chunk().map(|length| u64::from_le_bytes(*length)) {
        // What is longer is refused by its length alone.
        let length = length.min(part.bytes - 8).min(header::MAX_HEADER);
        start.resize(8 + length as usize, 0);
        file.read_exact_at(&mut start[8..], 8).map_err(&failed)?;
    }
    let tensors = stored(&start, part.bytes).map_err(|detail| CheckpointError::layout(&path, detail))?;
    Ok(Part {
        path,
        file,
        is_scratch: false,
        tensors,
    })
}

/// All tensors of a part, which share the memory that it was read into. Nothing of it is looked at before its digest was compared.
fn read_whole(
    path: &Path,
    mut file: File,
    part: &CheckpointPart,
) -> Result<Vec<NamedTensor>, CheckpointError> {
    let failed = CheckpointError::io("read", path, part.bytes);
    let refuse = |detail: String| CheckpointError::layout(path, detail);
    let mut memory = Tensor::f_empty([part.bytes as i64], (Kind::Uint8, Device::Cpu))
        .map_err(|error| refuse(error.to_string()))?;
    let bytes = slices::bytes_mut(&mut memory);
    let got = digest::filling(bytes, &mut file).map_err(failed)?;
    if !got.eq_ignore_ascii_case(&part.blake3) {
        let mut from_memory = |into: &mut [u8], at: u64| {
            into.copy_from_slice(&bytes[at as usize..][..into.len()]);
            Ok(())
        };
        return Err(CheckpointError::Digest {
            zeros: zeros_at_end(&mut from_memory, part.bytes),
            path: path.to_owned(),
            expected: part.blake3.clone(),
            got,
        });
    }
    let tensors = stored(bytes, part.bytes).map_err(refuse)?;
    let tensors = tensors.into_iter().map(|stored| {
        let of_torch = |error: tch::TchError| refuse(format!("tensor {}: {error}", stored.name));
        let rows = memory.f_narrow(0, stored.start as i64, stored.len as i64);
        // A tensor that begins amid a number's bytes, which no file of ours has, is copied to where it does not.
        let rows = match stored
            .start
            .is_multiple_of(stored.kind.elt_size_in_bytes() as u64)
        {
            true => rows,
            false => rows.map(|rows| rows.copy()),
        };
        let numbers = rows
            .and_then(|rows| rows.f_view_dtype(stored.kind))
            .map_err(of_torch)?;
        let tensor = numbers.f_view(&stored.shape[..]).map_err(of_torch)?;
        Ok((stored.name.clone(), tensor))
    });
    tensors.collect()
}

/// The bytes up to the end of a part that are zero, if they fill a block: read from the end, which `read` fills from an
/// offset. For a message: what cannot be read is not mentioned.
fn zeros_at_end(read: &mut dyn FnMut(&mut [u8], u64) -> io::Result<()>, end: u64) -> Option<Range<u64>> {
    let mut buffer = vec![0; CHUNK];
    let mut start = end;
    while start > 0 {
        let chunk = &mut buffer[..(CHUNK as u64).min(start) as usize];
        let at = start - chunk.len() as u64;
        read(chunk, at).ok()?;
        let other = chunk.iter().rposition(|byte| *byte != 0);
        start = other.map_or(at, |last| at + last as u64 + 1);
        if other.is_some() {
            break;
        }
    }
    (end - start >= BLOCK).then_some(start..end)
}

/// A tensor of a part, by its place in the file.
#[derive(Clone, Debug)]
struct Stored {
    name: String,
    kind: Kind,
    shape: Vec<i64>,
    /// First byte, from the start of the file.
    start: u64,
    /// Bytes.
    len: u64,
}

impl Stored {
    /// Bytes of one row along the first dimension; `rows` is its size.
    fn row_bytes(&self, rows: u64) -> u64 {
        self.len.checked_div(rows).unwrap_or(0)
    }
}

/// The tensors of a part of `bytes` bytes, in the order of their data, by the header at its `start`.
fn stored(start: &[u8], bytes: u64) -> Result<Vec<Stored>, String> {
    let header = header::read(start, bytes)?;
    let data = header.data;
    let tensors = header.tensors.into_iter().map(|tensor| {
        let kind = export::kind_of(tensor.dtype)
            .ok_or_else(|| format!("tensor {}: kind {} is not read", tensor.name, tensor.dtype))?;
        Ok(Stored {
            kind,
            start: (data + tensor.start) as u64,
            len: (tensor.end - tensor.start) as u64,
            name: tensor.name,
            shape: tensor.shape,
        })
    });
    tensors.collect()
}

/// Rows of one tensor, in a file.
#[derive(Debug)]
pub struct MappedRows {
    /// The file.
    pub path: PathBuf,
    /// Its bytes.
    pub map: MappedFile,
    /// First byte of the rows.
    pub start: usize,
    /// What their values are.
    pub kind: Kind,
    /// Shape of one row.
    pub row_shape: Vec<i64>,
    /// The classes that they belong to.
    pub classes: ClassRange,
}

/// A part whose contents are those that were committed.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
    /// It was fetched: what is read of it says nothing about the checkpoint.
    is_scratch: bool,
    tensors: Vec<Stored>,
}

impl Part {
    fn allocate(&self, stored: &Stored, shape: &[i64]) -> Result<Tensor, CheckpointError> {
        Tensor::f_empty(shape, (stored.kind, Device::Cpu)).map_err(|error| self.refuse(stored, error))
    }

    fn refuse(&self, stored: &Stored, why: impl std::fmt::Display) -> CheckpointError {
        CheckpointError::layout(&self.path, format!("tensor {}: {why}", stored.name))
    }

    /// Copies rows of this part's tensor of the same name as `like` into `tensor`. A tensor without rows must have
    /// the value that is there already.
    fn copy_rows(
        &self,
        like: &Stored,
        held: ClassRange,
        piece: &reshard::Piece,
        tensor: &Tensor,
    ) -> Result<(), CheckpointError> {
        let stored = self
            .tensors
            .iter()
            .find(|stored| stored.name == like.name)
            .cloned();
        let stored = stored.ok_or_else(|| self.refuse(like, "is missing, but another part has it"))?;
        let rows = u64::from(held.len());
        let fits = match (stored.shape.split_first(), like.shape.split_first()) {
            (Some((&first, rest)), Some((_, other))) => first == i64::from(held.len()) && rest == other,
            (None, None) => true,
            _ => false,
        };
        if !fits || stored.kind != like.kind {
            let detail = format!(
                "{:?} {:?} for {rows} classes, another part has {:?} {:?}",
                stored.kind, stored.shape, like.kind, like.shape
            );
            return Err(self.refuse(&stored, detail));
        }
        if stored.shape.is_empty() {
            let other = tensor.zeros_like();
            self.copy_in(&stored, stored.start, stored.len, &other.view([-1]))?;
            return match other.equal(tensor) {
                true => Ok(()),
                false => Err(self.refuse(&stored, "its value is not that of another part")),
            };
        }
        let bytes = piece.bytes(stored.row_bytes(rows));
        let target = tensor.narrow(0, piece.at.into(), (piece.rows.end - piece.rows.start).into());
        self.copy_in(
            &stored,
            stored.start + bytes.start,
            bytes.end - bytes.start,
            &target.view([-1]),
        )
    }

    /// Reads `len` bytes at `start` into `flat`, a contiguous tensor of one dimension and as many bytes.
    fn copy_in(&self, stored: &Stored, start: u64, len: u64, flat: &Tensor) -> Result<(), CheckpointError> {
        let failed = |error| match (
            CheckpointError::io("read", &self.path, len)(error),
            self.is_scratch,
        ) {
            (error, true) => error.of_scratch(),
            (error, false) => error,
        };
        let size = stored.kind.elt_size_in_bytes();
        let mut buffer = vec![0; CHUNK.min(len as usize)];
        let (mut at, mut element) = (start, 0);
        let mut left = len as usize;
        while left > 0 {
            let chunk = &mut buffer[..CHUNK.min(left)];
            self.file.read_exact_at(chunk, at).map_err(failed)?;
            let count = (chunk.len() / size) as i64;
            Tensor::f_from_data_size(chunk, &[count], stored.kind)
                .and_then(|values| flat.f_narrow(0, element, count)?.f_copy_(&values))
                .map_err(|error| {
                    CheckpointError::layout(&self.path, format!("tensor {}: {error}", stored.name))
                })?;
            element += count;
            at += chunk.len() as u64;
            left -= chunk.len();
        }
        Ok(())
    }
}
