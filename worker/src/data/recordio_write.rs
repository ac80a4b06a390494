//! Writes `.rec` and `.idx` in the InsightFace layout. The files get their names only when they are complete:
//! a run that is broken off leaves no half data set behind, and readers of an old file keep it. What it has written can be
//! gone on with from a [`Mark`].

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    error::DataError,
    journal::Mark,
    recordio::{MAGIC, MAX_PAYLOAD},
};

/// A pair of files being written.
#[derive(Debug)]
pub struct RecordWriter {
    rec_path: PathBuf,
    rec: BufWriter<File>,
    idx: BufWriter<File>,
    offset: u64,
    /// The temporary files stay if it is not finished.
    kept: bool,
    finished: bool,
}

/// Labels and ids of a record to write.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordHeader {
    /// One label is stored in the header, several as a label array.
    pub labels: Vec<f32>,
    /// Usually the key.
    pub id: u64,
}

impl RecordWriter {
    /// Begins `path` (`.rec`) and the `.idx` beside it, under temporary names.
    pub fn create(path: &Path) -> Result<Self, DataError> {
        let open = |path: &Path| {
            let path = temporary(path);
            File::create(&path)
                .map(BufWriter::new)
                .map_err(|e| DataError::io(&path, e))
        };
        Ok(Self {
            rec_path: path.into(),
            rec: open(path)?,
            idx: open(&path.with_extension("idx"))?,
            offset: 0,
            kept: false,
            finished: false,
        })
    }

    /// Goes on with the temporary files of an earlier run from a mark. `last` is the key that the index ended with.
    fn resume(path: &Path, mark: &Mark, last: u64) -> Result<Self, DataError> {
        let open = |path: &Path, bytes: u64| {
            let path = temporary(path);
            let failed = |error| DataError::io(&path, error);
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(failed)?;
            let there = file.metadata().map_err(failed)?.len();
            if there < bytes {
                return Err(DataError::format(
                    &path,
                    format!("has {there} bytes, not {bytes}"),
                ));
            }
            file.set_len(bytes)
                .and_then(|()| file.seek(SeekFrom::End(0)))
                .map_err(failed)?;
            Ok(file)
        };
        let rec = open(path, mark.rec)?;
        let idx_path = path.with_extension("idx");
        let mut idx = open(&idx_path, mark.idx)?;
        if last_key(&mut idx).map_err(|error| DataError::io(&temporary(&idx_path), error))? != Some(last) {
            let message = format!("does not end with key {last}");
            return Err(DataError::format(&temporary(&idx_path), message));
        }
        Ok(Self {
            rec_path: path.into(),
            rec: BufWriter::new(rec),
            idx: BufWriter::new(idx),
            offset: mark.rec,
            kept: true,
            finished: false,
        })
    }

    /// Brings all to the disk that was written; gives the bytes of both files.
    fn sync(&mut self) -> Result<(u64, u64), DataError> {
        let idx_path = self.rec_path.with_extension("idx");
        let mut bytes = [0; 2];
        let files = [(&mut self.rec, &self.rec_path), (&mut self.idx, &idx_path)];
        for (bytes, (writer, path)) in bytes.iter_mut().zip(files) {
            *bytes = writer
                .flush()
                .and_then(|()| writer.get_ref().sync_data())
                .and_then(|()| writer.get_ref().metadata())
                .map_err(|error| DataError::io(&temporary(path), error))?
                .len();
        }
        Ok((bytes[0], bytes[1]))
    }

    /// Appends a record under `key`.
    pub fn write(&mut self, key: u64, header: &RecordHeader, body: &[u8]) -> Result<(), DataError> {
        self.write_payload(key, &pack(header, body))
    }

    fn name(&self, key: u64) -> String {
        format!("{}: record {key}", self.rec_path.display())
    }

    /// Appends a payload as another file has it.
    pub fn write_payload(&mut self, key: u64, payload: &[u8]) -> Result<(), DataError> {
        let framed = frame(payload).map_err(|message| DataError::record(self.name(key), message))?;
        writeln!(self.idx, "{key}\t{}", self.offset)
            .and_then(|()| self.rec.write_all(&framed))
            .map_err(|e| DataError::io(&temporary(&self.rec_path), e))?;
        self.offset += framed.len() as u64;
        Ok(())
    }

    /// Writes the first record again, which must have had as many labels and no body.
    fn replace_first(&mut self, header: &RecordHeader) -> Result<(), DataError> {
        let framed = frame(&pack(header, b"")).map_err(|message| DataError::record(self.name(0), message))?;
        self.rec
            .flush()
            .and_then(|()| self.rec.get_ref().write_all_at(&framed, 0))
            .map_err(|e| DataError::io(&temporary(&self.rec_path), e))
    }

    /// Syncs both files and gives them their names, the `.rec` first: an index is there only with its records.
    pub fn finish(mut self) -> Result<(), DataError> {
        let idx_path = self.rec_path.with_extension("idx");
        for (writer, path) in [(&mut self.rec, &self.rec_path), (&mut self.idx, &idx_path)] {
            writer
                .flush()
                .and_then(|()| writer.get_ref().sync_all())
                .map_err(|e| DataError::io(path, e))?;
        }
        // An old index must not be found with the new records.
        match fs::remove_file(&idx_path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(DataError::io(&idx_path, e)),
            _ => {}
        }
        for path in [&self.rec_path, &idx_path] {
            fs::rename(temporary(path), path).map_err(|e| DataError::io(path, e))?;
        }
        self.finished = true;
        sync_parent(&self.rec_path)
    }
}

/// Writes the whole InsightFace layout: a header record, the images under keys 1..=N, one record for each identity with
/// its range of keys. Images come in order of their labels.
#[derive(Debug)]
pub struct LayoutWriter {
    writer: RecordWriter,
    /// Images and identities that were announced; without, as many as come.
    announced: Option<(u64, u32)>,
    /// Keys of the first image of each identity so far.
    first_keys: Vec<u64>,
    next_key: u64,
}

impl LayoutWriter {
    /// Begins `path` (`.rec`) for so many images and identities.
    pub fn create(path: &Path, num_image: u64, num_classes: u32) -> Result<Self, DataError> {
        Self::begin(path, Some((num_image, num_classes)))
    }

    /// Begins `path` (`.rec`) for images that are counted as they come.
    pub fn open_ended(path: &Path) -> Result<Self, DataError> {
        Self::begin(path, None)
    }

    /// Goes on from a mark, before which each identity in turn got so many `images`, none of them none.
    ///
    /// # Errors
    /// If the temporary files are not there, shorter, or others.
    pub fn resume(path: &Path, mark: &Mark, images: &[u64]) -> Result<Self, DataError> {
        let first_keys = images.iter().scan(1, |next, images| {
            let first = *next;
            *next += images;
            Some(first)
        });
        let first_keys: Vec<u64> = first_keys.collect();
        let next_key = 1 + images.iter().sum::<u64>();
        Ok(Self {
            writer: RecordWriter::resume(path, mark, next_key - 1)?,
            announced: None,
            first_keys,
            next_key,
        })
    }

    /// Brings all to the disk that was written, and keeps it if the run is broken off. `items` are those that are done.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn mark(&mut self, items: u64) -> Result<Mark, DataError> {
        let (rec, idx) = self.writer.sync()?;
        self.writer.kept = true;
        Ok(Mark { items, rec, idx })
    }

    fn begin(path: &Path, announced: Option<(u64, u32)>) -> Result<Self, DataError> {
        let mut writer = RecordWriter::create(path)?;
        let (num_image, num_classes) = announced.unwrap_or_default();
        writer.write(0, &layout_header(num_image, num_classes), b"")?;
        Ok(Self {
            writer,
            announced,
            first_keys: Vec::new(),
            next_key: 1,
        })
    }

    /// Images so far.
    pub fn images(&self) -> u64 {
        self.next_key - 1
    }

    /// Identities so far.
    pub fn identities(&self) -> u32 {
        // Labels are u32 and each comes once.
        self.first_keys.len() as u32
    }

    /// Appends an image. Labels must be 0, 1, 2, ... without a gap, each as often as it has images.
    pub fn write(&mut self, label: u32, body: &[u8]) -> Result<(), DataError> {
        let key = self.next_key;
        let seen = self.first_keys.len() as u64;
        if u64::from(label) == seen {
            self.first_keys.push(key);
        } else if u64::from(label) + 1 != seen {
            let message = format!(
                "label {label} comes after {seen} identities, but labels must be in order without a gap"
            );
            return Err(DataError::record(self.writer.name(key), message));
        }
        let header = RecordHeader {
            labels: vec![label as f32],
            id: key,
        };
        self.next_key += 1;
        self.writer.write(key, &header, body)
    }

    /// Writes the identity records and gives the files their names.
    pub fn finish(mut self) -> Result<(), DataError> {
        let (images, identities) = (self.images(), self.identities());
        match self.announced {
            Some(announced) if announced != (images, identities) => {
                let message = format!(
                    "{images} images of {identities} identities were written, not {} of {}",
                    announced.0, announced.1
                );
                return Err(DataError::format(&self.writer.rec_path, message));
            }
            Some(_) => {}
            None if images == 0 => {
                let message = "no image is left, and an empty set is not written";
                return Err(DataError::format(&self.writer.rec_path, message));
            }
            None => self.writer.replace_first(&layout_header(images, identities))?,
        }
        let end = self.next_key;
        let ends = self.first_keys.iter().skip(1).copied().chain([end]);
        for ((first, last), key) in self.first_keys.iter().zip(ends).zip(end..) {
            let header = RecordHeader {
                labels: vec![*first as f32, last as f32],
                id: key,
            };
            self.writer.write(key, &header, b"")?;
        }
        self.writer.finish()
    }
}

/// Record 0: one past the last image's key, one past the last identity's.
fn layout_header(num_image: u64, num_classes: u32) -> RecordHeader {
    let end = num_image + 1;
    RecordHeader {
        // f32 rounds from 2^24 on; readers find the border by the first record without an image.
        labels: vec![end as f32, (end + u64::from(num_classes)) as f32],
        id: 0,
    }
}

impl Drop for RecordWriter {
    fn drop(&mut self) {
        if !self.finished && !self.kept {
            for path in [&self.rec_path, &self.rec_path.with_extension("idx")] {
                // Best effort: a temporary file that stays is overwritten by the next run.
                fs::remove_file(temporary(path)).unwrap_or_default();
            }
        }
    }
}

/// Writes a whole file under a temporary name, syncs it and gives it its name.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let temporary = temporary(path);
    File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(|e| DataError::io(path, e))?;
    sync_parent(path)
}

/// Key of the last line of an index.
fn last_key(idx: &mut File) -> io::Result<Option<u64>> {
    /// Longer than any line.
    const TAIL: u64 = 64;
    let length = idx.metadata()?.len();
    idx.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut tail = Vec::new();
    idx.read_to_end(&mut tail)?;
    let text = String::from_utf8_lossy(&tail);
    let line = text.strip_suffix('\n').and_then(|text| text.rsplit('\n').next());
    Ok(line.and_then(|line| line.split_once('\t')?.0.parse().ok()))
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}

fn sync_parent(path: &Path) -> Result<(), DataError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| DataError::io(parent, e))
}

/// Header and body as a payload.
fn pack(header: &RecordHeader, body: &[u8]) -> Vec<u8> {
    let (flag, label, array) = match header.labels.as_slice() {
        [label] => (0, *label, &[][..]),
        labels => (labels.len() as u32, 0.0, labels),
    };
    let mut out = Vec::with_capacity(24 + 4 * array.len() + body.len());
    out.extend(flag.to_le_bytes());
    out.extend(label.to_le_bytes());
    out.extend(header.id.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    array.iter().for_each(|label| out.extend(label.to_le_bytes()));
    out.extend(body);
    out
}

/// A payload as parts: split wherever the magic stands at a multiple of 4.
fn frame(payload: &[u8]) -> Result<Vec<u8>, String> {
    // A part holds more, but it would not be believed when it is read.
    if payload.len() > MAX_PAYLOAD {
        return Err(format!(
            "{} bytes do not fit into a record, which has {MAX_PAYLOAD} at most",
            payload.len()
        ));
    }
    let magic = MAGIC.to_le_bytes();
    let cuts: Vec<usize> = payload
        .as_chunks::<4>()
        .0
        .iter()
        .enumerate()
        .filter(|(_, word)| **word == magic)
        .map(|(place, _)| 4 * place)
        .collect();
    let mut out = Vec::with_capacity(payload.len() + 12 + 8 * cuts.len());
    let mut start = 0;
    for (number, end) in cuts.iter().copied().chain([payload.len()]).enumerate() {
        let cflag: u32 = match (number, number == cuts.len()) {
            (0, true) => 0,
            (0, false) => 1,
            (_, false) => 2,
            (_, true) => 3,
        };
        let part = payload.get(start..end).unwrap_or_default();
        out.extend(magic);
        out.extend((cflag << 29 | part.len() as u32).to_le_bytes());
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
        start = end + 4;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Dataset,
            mmap::Access,
            record_set::RecordSet,
            recordio::{HEADER_BYTES, RecordFile},
        },
        *,
    };
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read(
            words in proptest::collection::vec(prop_oneof![3 => any::<u32>(), 1 => Just(MAGIC)], 0..40),
            tail in proptest::collection::vec(any::<u8>(), 0..4),
            labels in proptest::collection::vec(0f32..100.0, 1..4),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("train.rec");
            let body: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).chain(tail).collect();
            let header = RecordHeader { labels, id: 9 };
            let mut writer = RecordWriter::create(&path).unwrap();
            for key in [4, 5] {
                writer.write(key, &header, &body).unwrap();
            }
            prop_assert!(!path.exists(), "nothing has its name before it is complete");
            writer.finish().unwrap();
            let file = RecordFile::open(&path, Access::Random).unwrap();
            file.check_offsets().unwrap();
            for key in [4, 5] {
                let record = file.read(key).unwrap();
                prop_assert_eq!(record.body.as_ref(), &body[..]);
                prop_assert_eq!(&record.labels, &header.labels);
                prop_assert_eq!((record.id, record.id2), (9, 0));
            }
        }
    }

    /// What was longer than the reader believes was written, and found to be no good by the job.
    #[test]
    fn the_longest_record_is_read_and_a_longer_one_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.rec");
        let mut writer = RecordWriter::create(&path).unwrap();
        let header = RecordHeader {
            labels: vec![1.0],
            id: 1,
        };
        let mut body = vec![7; MAX_PAYLOAD - HEADER_BYTES];
        writer.write(1, &header, &body).unwrap();
        body.push(7);
        let error = writer.write(2, &header, &body).unwrap_err().to_string();
        assert!(
            error.ends_with("record 2: 16777217 bytes do not fit into a record, which has 16777216 at most"),
            "{error}"
        );
        writer.finish().unwrap();
        let file = RecordFile::open(&path, Access::Random).unwrap();
        assert_eq!(file.read(1).unwrap().body.len(), MAX_PAYLOAD - HEADER_BYTES);
    }

    #[test]
    fn the_layout_is_the_one_that_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.rec");
        let mut writer = LayoutWriter::create(&path, 3, 2).unwrap();
        for label in [0, 0, 1] {
            writer.write(label, b"jpeg").unwrap();
        }
        writer.finish().unwrap();
        let set = RecordSet::open(&path, None).unwrap();
        assert_eq!((set.len(), set.num_classes()), (3, 2));
        assert_eq!(set.file().read(0).unwrap().labels, [4.0, 6.0]);
        assert_eq!(set.file().read(4).unwrap().labels, [1.0, 3.0]);
        assert_eq!(set.file().read(5).unwrap().labels, [3.0, 4.0]);
        let mut writer = LayoutWriter::create(&path, 3, 2).unwrap();
        writer.write(0, b"jpeg").unwrap();
        assert!(
            writer
                .write(2, b"jpeg")
                .unwrap_err()
                .to_string()
                .contains("without a gap")
        );
        assert!(
            writer
                .finish()
                .unwrap_err()
                .to_string()
                .contains("1 images of 1 identities")
        );
    }

    #[test]
    fn what_is_counted_as_it_comes_is_as_if_it_had_been_announced() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a.rec", "b.rec"].map(|name| dir.path().join(name));
        let mut writers = [
            LayoutWriter::create(&a, 3, 2).unwrap(),
            LayoutWriter::open_ended(&b).unwrap(),
        ];
        for writer in &mut writers {
            for label in [0, 1, 1] {
                writer.write(label, b"jpeg").unwrap();
            }
            assert_eq!((writer.images(), writer.identities()), (3, 2));
        }
        for writer in writers {
            writer.finish().unwrap();
        }
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
        let empty = LayoutWriter::open_ended(&b).unwrap().finish();
        assert!(empty.unwrap_err().to_string().contains("no image is left"));
    }

    #[test]
    fn a_run_that_is_broken_off_goes_on_from_its_mark() {
        let dir = tempfile::tempdir().unwrap();
        let [whole, parts] = ["whole.rec", "parts.rec"].map(|name| dir.path().join(name));
        let labels = [0, 0, 1, 2, 2, 2];
        let write = |writer: &mut LayoutWriter, labels: &[u32]| {
            for &label in labels {
                writer.write(label, &[label as u8; 9]).unwrap();
            }
        };
        let mut writer = LayoutWriter::open_ended(&whole).unwrap();
        write(&mut writer, &labels);
        writer.finish().unwrap();
        let mut writer = LayoutWriter::open_ended(&parts).unwrap();
        write(&mut writer, &labels[..4]);
        let mark = writer.mark(4).unwrap();
        // Not on the disk for sure when the machine died.
        write(&mut writer, &labels[4..5]);
        drop(writer);
        let other = LayoutWriter::resume(&parts, &mark, &[2, 1])
            .unwrap_err()
            .to_string();
        assert!(other.contains("does not end with key 3"), "{other}");
        let mut writer = LayoutWriter::resume(&parts, &mark, &[2, 1, 1]).unwrap();
        assert_eq!((writer.images(), writer.identities()), (4, 3));
        write(&mut writer, &labels[4..]);
        writer.finish().unwrap();
        for ending in ["rec", "idx"] {
            let [a, b] = [&whole, &parts].map(|path| fs::read(path.with_extension(ending)).unwrap());
            assert_eq!(a, b, "{ending}");
        }
        let gone = LayoutWriter::resume(&parts, &mark, &[2, 1, 1]).unwrap_err();
        assert!(gone.to_string().contains("parts.rec.partial"), "{gone}");
    }

    #[test]
    fn a_broken_off_run_leaves_the_old_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.rec");
        let header = RecordHeader {
            labels: vec![1.0],
            id: 0,
        };
        let mut writer = RecordWriter::create(&path).unwrap();
        writer.write(0, &header, b"old").unwrap();
        writer.finish().unwrap();
        let mut writer = RecordWriter::create(&path).unwrap();
        writer.write(0, &header, b"new").unwrap();
        drop(writer);
        let file = RecordFile::open(&path, Access::Random).unwrap();
        assert_eq!(file.read(0).unwrap().body.as_ref(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
