//! A `train.rec` in the InsightFace layout as a data set. Owns what records mean: record 0 says which keys are images
//! and how many identities there are; a file without it (as `shuffle_rec.py` writes) has an image under every key.

use std::path::Path;

use super::{
    DataError, Dataset, Image, Record,
    decode::OtherSize,
    mmap::Access,
    recordio::{ImageRecord, RecordFile},
};

/// Up to so many records the labels are read to check a given number of classes; beyond, the number is trusted and
/// each label is checked when its image is read (reading a page of each of 40 million records takes minutes).
const COUNT_CLASSES_BELOW: usize = 2_000_000;

/// Whole numbers up to here are exact in the header's f32 labels.
const F32_EXACT: f32 = 16_777_216.0;

/// An InsightFace data set.
#[derive(Debug)]
pub struct RecordSet {
    file: RecordFile,
    images: Images,
    num_classes: u32,
}

/// Which records are images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Images {
    /// Keys 1..=last, after a header record.
    UpTo(u64),
    /// Every key.
    All,
}

impl RecordSet {
    /// Opens `path` (`.rec`) and its index; every offset must lie inside the file. `num_classes` spares counting
    /// where no header says how many identities there are.
    pub fn open(path: &Path, num_classes: Option<u32>) -> Result<Self, DataError> {
        Self::open_for(path, num_classes, Access::Random)
    }

    /// The same for records that will be read in another order than by chance.
    pub fn open_for(path: &Path, num_classes: Option<u32>, access: Access) -> Result<Self, DataError> {
        let file = RecordFile::open(path, access)?;
        file.check_offsets()?;
        let (mut set, identities) = Self::from_file(file)?;
        set.num_classes = match (identities, num_classes) {
            (Some(identities), _) => identities,
            (None, Some(given)) if set.file.index().len() > COUNT_CLASSES_BELOW => given,
            (None, _) => set.count_classes()?,
        };
        Ok(set)
    }

    /// Opens a file that may be damaged, to look at its records one by one: offsets are not checked, and where no header
    /// says how many identities there are every label passes.
    pub fn open_unchecked(path: &Path) -> Result<Self, DataError> {
        let (mut set, identities) = Self::from_file(RecordFile::open(path, Access::Sequential)?)?;
        set.num_classes = identities.unwrap_or(u32::MAX);
        Ok(set)
    }

    fn from_file(file: RecordFile) -> Result<(Self, Option<u32>), DataError> {
        let header = read_header(&file)?;
        let set = Self {
            file,
            images: header.map_or(Images::All, |header| Images::UpTo(header.last_image)),
            num_classes: u32::MAX,
        };
        Ok((set, header.and_then(|header| header.identities)))
    }

    /// The records below.
    pub fn file(&self) -> &RecordFile {
        &self.file
    }

    /// Key of an image.
    pub fn key(&self, index: u64) -> Option<u64> {
        match self.images {
            Images::UpTo(last) => (index < last).then_some(index + 1),
            Images::All => self.file.index().key(usize::try_from(index).ok()?),
        }
    }

    fn count_classes(&self) -> Result<u32, DataError> {
        let mut classes = 0;
        for index in 0..self.len() {
            let label = self.record(index)?.label;
            classes = classes.max(label.saturating_add(1));
        }
        Ok(classes)
    }
}

impl Dataset for RecordSet {
    fn len(&self) -> u64 {
        match self.images {
            Images::UpTo(last) => last,
            Images::All => self.file.index().len() as u64,
        }
    }

    fn num_classes(&self) -> u32 {
        self.num_classes
    }

    fn describe(&self) -> String {
        format!(
            "RecordIO {}: {} images of {} identities",
            self.file.path().display(),
            self.len(),
            self.num_classes
        )
    }

    fn name(&self, index: u64) -> String {
        match self.key(index) {
            Some(key) => self.file.name(key),
            None => format!("{}: image {index}", self.file.path().display()),
        }
    }

    fn record(&self, index: u64) -> Result<Record<'_>, DataError> {
        let key = self
            .key(index)
            .ok_or_else(|| DataError::record(self.name(index), "there is no such image"))?;
        let record = self.file.read(key)?;
        let label = class(&record).map_err(|message| self.file.error(key, message))?;
        if label >= self.num_classes {
            let message = format!(
                "label {label} is not below the number of classes, {}",
                self.num_classes
            );
            return Err(self.file.error(key, message));
        }
        if record.body.is_empty() {
            return Err(self.file.error(key, "the record has no image"));
        }
        Ok(Record {
            label,
            image: Image::Encoded(record.body, OtherSize::Refuse),
        })
    }
}

/// The identity of a record: the first of its labels, a whole number.
pub fn class(record: &ImageRecord<'_>) -> Result<u32, String> {
    let label = record.labels.first().copied().unwrap_or(f32::NAN);
    // 2^32 itself is the first f32 above every u32.
    match (0.0..4_294_967_296.0).contains(&label) && label.fract() == 0.0 {
        true => Ok(label as u32),
        false => Err(format!("label {label} is not a class number")),
    }
}

/// What record 0 says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    /// Images have keys 1..=last_image.
    last_image: u64,
    /// Identity records behind them; `None` if there are none.
    identities: Option<u32>,
}

fn read_header(file: &RecordFile) -> Result<Option<Header>, DataError> {
    if file.index().offset(0).is_none() {
        return Ok(None);
    }
    let record = file.read(0)?;
    // With an image in it, record 0 is one of many images that have label arrays, not the header.
    if record.flag == 0 || !record.body.is_empty() {
        return Ok(None);
    }
    let &[end, end_identities, ..] = record.labels.as_slice() else {
        return Err(file.error(0, format!("the header record has {} labels, not 2", record.flag)));
    };
    let whole = |x: f32| (1.0..1e12).contains(&x) && x.fract() == 0.0;
    if !whole(end) || !whole(end_identities) || end_identities < end {
        return Err(file.error(
            0,
            format!("the header's labels [{end}, {end_identities}] are no ranges of keys"),
        ));
    }
    let keys = file.index().len() as u64;
    let header = if end < F32_EXACT {
        Header {
            last_image: end as u64 - 1,
            identities: u32::try_from((end_identities - end) as u64)
                .ok()
                .filter(|&n| n > 0),
        }
    } else {
        // The header's numbers are rounded; the first record without an image is where identities begin.
        let last_image = exact_last_image(end, keys, |key| Ok(file.read(key)?.body.is_empty()))?;
        Header {
            last_image,
            identities: u32::try_from(keys.saturating_sub(last_image + 1))
                .ok()
                .filter(|&n| n > 0),
        }
    };
    if header.last_image == 0 {
        return Err(file.error(0, "the header says that there are no images"));
    }
    if let Some(missing) = first_missing(file, header.last_image) {
        let message = format!(
            "the header says that keys 1 to {} are images, but the index lacks key {missing}",
            header.last_image
        );
        return Err(file.error(0, message));
    }
    Ok(Some(header))
}

/// First of the keys 1..=last that the index lacks.
fn first_missing(file: &RecordFile, last: u64) -> Option<u64> {
    let mut expected = 1;
    for (key, _) in file.index().iter().skip_while(|(key, _)| *key == 0) {
        if key != expected || expected > last {
            break;
        }
        expected += 1;
    }
    (expected <= last).then_some(expected)
}

/// The last image's key where `end` (one more) was rounded to f32, which moves it by less than `end / 2^23`.
fn exact_last_image(
    end: f32,
    keys: u64,
    is_identity: impl Fn(u64) -> Result<bool, DataError>,
) -> Result<u64, DataError> {
    let slack = (end / 8_388_608.0) as u64 + 1;
    let from = (end as u64).saturating_sub(slack).max(1);
    for key in from..(end as u64 + slack).min(keys) {
        if is_identity(key)? {
            return Ok(key - 1);
        }
    }
    // No identity records: everything behind the header is an image.
    Ok(keys.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::{
        super::recordio_write::{RecordHeader, RecordWriter},
        *,
    };
    use std::{fs, path::PathBuf};

    fn header(labels: &[f32]) -> RecordHeader {
        RecordHeader {
            labels: labels.to_vec(),
            id: 0,
        }
    }

    fn write(dir: &Path, records: &[(u64, &[f32], &[u8])]) -> PathBuf {
        let path = dir.join("train.rec");
        let mut writer = RecordWriter::create(&path).unwrap();
        for (key, labels, body) in records {
            writer.write(*key, &header(labels), body).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    fn labels(set: &RecordSet) -> Vec<u32> {
        (0..set.len()).map(|i| set.record(i).unwrap().label).collect()
    }

    #[test]
    fn the_header_says_what_is_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(
            dir.path(),
            &[
                (0, &[3.0, 5.0], b""),
                (1, &[0.0], b"a"),
                (2, &[1.0, 9.0], b"b"),
                (3, &[1.0, 2.0], b""),
                (4, &[2.0, 3.0], b""),
            ],
        );
        let set = RecordSet::open(&path, None).unwrap();
        assert_eq!((set.len(), set.num_classes()), (2, 2));
        assert_eq!(labels(&set), [0, 1]);
    }

    #[test]
    fn without_a_header_every_key_is_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(
            dir.path(),
            &[(0, &[4.0, 0.0], b"a"), (1, &[0.0], b"b"), (9, &[2.0], b"c")],
        );
        let set = RecordSet::open(&path, None).unwrap();
        assert_eq!((set.len(), set.num_classes()), (3, 5));
        assert_eq!(labels(&set), [4, 0, 2]);
        assert!(set.name(2).contains("record 9 at offset"));
    }

    #[test]
    fn bad_labels_name_the_key() {
        let dir = tempfile::tempdir().unwrap();
        for (label, expected) in [
            (2.0, "label 2 is not below the number of classes, 2"),
            (-1.0, "label -1 is not a class number"),
            (0.5, "label 0.5 is not a class number"),
            (f32::NAN, "label NaN is not a class number"),
        ] {
            let path = write(
                dir.path(),
                &[(0, &[3.0, 5.0], b""), (1, &[0.0], b"a"), (2, &[label], b"b")],
            );
            let error = RecordSet::open(&path, None)
                .unwrap()
                .record(1)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("record 2 at offset") && error.ends_with(expected),
                "{error}"
            );
        }
    }

    #[test]
    fn damaged_files_are_refused_when_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(
            dir.path(),
            &[(0, &[3.0, 3.0], b""), (1, &[0.0], b"aaaa"), (2, &[1.0], b"bbbb")],
        );
        let idx_path = path.with_extension("idx");
        let (rec, idx) = (fs::read(&path).unwrap(), fs::read_to_string(&idx_path).unwrap());
        let open = || RecordSet::open(&path, None).unwrap_err().to_string();
        fs::write(&path, &rec[..rec.len() - 2]).unwrap();
        assert!(open().contains("record 2 at offset"), "{}", open());
        fs::write(&path, &rec[..50]).unwrap();
        assert!(
            open().contains("record 2 at offset") && open().contains("past the end"),
            "{}",
            open()
        );
        fs::write(&path, &rec).unwrap();
        fs::write(&idx_path, idx.lines().take(2).collect::<Vec<_>>().join("\n")).unwrap();
        assert!(
            open().ends_with("keys 1 to 2 are images, but the index lacks key 2"),
            "{}",
            open()
        );
        fs::write(&idx_path, "").unwrap();
        assert!(open().ends_with("the index is empty"), "{}", open());
        fs::remove_file(&idx_path).unwrap();
        assert!(
            open().ends_with("train.idx: no such file or folder"),
            "{}",
            open()
        );
    }

    #[test]
    fn rounded_headers_are_made_exact() {
        let last = 42_474_557u64;
        for rounded in [42_474_556.0f32, 42_474_560.0] {
            let found = exact_last_image(rounded, last + 100, |key| Ok(key > last)).unwrap();
            assert_eq!(found, last);
        }
        assert_eq!(
            exact_last_image(16_777_216.0, 16_777_216, |_| Ok(false)).unwrap(),
            16_777_215
        );
    }
}
