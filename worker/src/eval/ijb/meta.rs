//! Readers of the meta files. They believe nothing: columns are counted, numbers must be numbers, templates must
//! exist and counts must agree; what is wrong is named with its line. Files are mapped and read line by line, so the
//! memory taken is that of the result; the list of pairs (15.7 million lines for IJB-C) is read in parallel.

use super::{IjbError, Layout};
use crate::data::{Access, MappedFile};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Bytes of the list of pairs that one thread reads at a time.
const BLOCK: usize = 4 << 20;
/// Longest piece of a file that is repeated in an error, in bytes.
const EXCERPT: usize = 40;
/// Template ids below this are looked up in a table, others by binary search.
const TABLE: u32 = 1 << 22;

/// An image of the benchmark.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// File name in the folder of images.
    pub name: String,
    /// Left eye, right eye, nose, left and right corner of the mouth: x, y in pixels.
    pub landmarks: [[f32; 2]; 5],
    /// Score of the face detector, about [0, 1].
    pub faceness: f32,
}

/// Which template an image is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Index of the template among the sorted ids.
    pub template: u32,
    /// Photograph or video that the image comes from.
    pub media: u32,
}

/// The template ids of a benchmark, sorted: a template's index is its place here.
#[derive(Clone, Debug)]
pub struct TemplateIds {
    ids: Vec<u32>,
    table: Vec<u32>,
}

impl TemplateIds {
    fn new(mut ids: Vec<u32>) -> Self {
        ids.sort_unstable();
        ids.dedup();
        let size = ids.last().map_or(0, |&last| last.min(TABLE - 1) + 1);
        let mut table = vec![u32::MAX; size as usize];
        for (index, &id) in (0..).zip(&ids) {
            if let Some(slot) = table.get_mut(id as usize) {
                *slot = index;
            }
        }
        Self { ids, table }
    }

    /// Index of an id.
    pub fn index(&self, id: u32) -> Option<u32> {
        match self.table.get(id as usize) {
            Some(&index) => (index != u32::MAX).then_some(index),
            // Fewer ids than lines of a file that was read into memory: the index fits.
            None => self.ids.binary_search(&id).ok().map(|index| index as u32),
        }
    }

    /// All ids, sorted.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}

/// Comparisons of the 1:1 protocol, in the order of the file; all three have the same length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pairs {
    /// Index of the first template.
    pub first: Vec<u32>,
    /// Index of the second template.
    pub second: Vec<u32>,
    /// True if they are the same person.
    pub same: Vec<bool>,
}

/// A template of the 1:N protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Index of the template.
    pub template: u32,
    /// Who it is.
    pub subject: u32,
}

/// A mapped meta file.
struct MetaFile {
    path: PathBuf,
    bytes: MappedFile,
}

impl MetaFile {
    fn open(path: PathBuf) -> Result<Self, IjbError> {
        let bytes = MappedFile::open(&path, Access::Sequential).map_err(IjbError::io(&path))?;
        Ok(Self { path, bytes })
    }

    /// What `parse` makes of every line that is not blank.
    fn map<'a, T>(&'a self, parse: impl Fn(&'a [u8]) -> Result<T, String>) -> Result<Vec<T>, IjbError> {
        lines(&self.bytes)
            .map(|(line, text)| parse(text).map_err(|detail| self.error(line, detail)))
            .collect()
    }

    fn error(&self, line: usize, detail: String) -> IjbError {
        IjbError::Line {
            path: self.path.clone(),
            line,
            detail,
        }
    }
}

/// Lines with their numbers from 1, without white space around them; blank ones are left out.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let numbered = (1..).zip(bytes.split(|&b| b == b'\n'));
    numbered
        .map(|(line, text)| (line, text.trim_ascii()))
        .filter(|(_, text)| !text.is_empty())
}

/// The columns of a line, which must be `N`.
fn columns<const N: usize>(line: &[u8]) -> Result<[&[u8]; N], String> {
    let mut out: [&[u8]; N] = [&[]; N];
    let mut count = 0;
    for column in line.split(u8::is_ascii_whitespace).filter(|c| !c.is_empty()) {
        if let Some(slot) = out.get_mut(count) {
            *slot = column;
        }
        count += 1;
    }
    match count == N {
        true => Ok(out),
        false => Err(format!("{count} columns, expected {N}")),
    }
}

/// A whole number.
fn number(text: &[u8], what: &str) -> Result<u32, String> {
    let digits = text.iter().try_fold(0u32, |value, &byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit <= 9)?;
        value.checked_mul(10)?.checked_add(u32::from(digit))
    });
    match digits {
        Some(value) if !text.is_empty() => Ok(value),
        _ => Err(format!(
            "{what} {:?} is not a whole number from 0 to {}",
            excerpt(text),
            u32::MAX
        )),
    }
}

/// A finite number.
fn real(text: &[u8], what: &str) -> Result<f32, String> {
    let value = std::str::from_utf8(text).ok().and_then(|t| t.parse::<f32>().ok());
    value
        .filter(|value| value.is_finite())
        .ok_or_else(|| format!("{what} {:?} is not a finite number", excerpt(text)))
}

/// The beginning of `text`, fit for a message.
fn excerpt(text: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&text[..text.len().min(EXCERPT)]).into_owned();
    match text.len() > EXCERPT {
        true => shown + "...",
        false => shown,
    }
}

/// The list of images.
pub fn read_images(layout: &Layout) -> Result<Vec<Image>, IjbError> {
    let file = MetaFile::open(layout.images())?;
    let images = file.map(|line| {
        let [name, numbers @ ..] = columns::<12>(line)?;
        let mut landmarks = [[0.0; 2]; 5];
        for (place, text) in landmarks.as_flattened_mut().iter_mut().zip(numbers) {
            *place = real(text, "coordinate")?;
        }
        let name = std::str::from_utf8(name).map_err(|_| format!("name {:?} is not UTF-8", excerpt(name)))?;
        Ok(Image {
            name: name.to_owned(),
            landmarks,
            faceness: real(numbers[10], "faceness")?,
        })
    })?;
    match images.is_empty() {
        true => Err(IjbError::file(&file.path, "lists no image")),
        false => Ok(images),
    }
}

/// Template and media of the images, which must be the same as in the list of images and in its order, and the ids of all
/// templates.
pub fn read_memberships(
    layout: &Layout,
    images: &[Image],
) -> Result<(Vec<Membership>, TemplateIds), IjbError> {
    let file = MetaFile::open(layout.memberships())?;
    let rows: Vec<(&[u8], u32, u32)> = file.map(|line| {
        let [name, template, media] = columns::<3>(line)?;
        Ok((name, number(template, "template")?, number(media, "media")?))
    })?;
    let list = layout.images();
    if rows.len() != images.len() {
        let (here, there) = (rows.len(), images.len());
        let detail = format!("lists {here} images, but {} lists {there}", list.display());
        return Err(IjbError::file(&file.path, detail));
    }
    let mut both = (1..).zip(rows.iter().zip(images));
    if let Some((number, ((name, ..), image))) =
        both.find(|(_, ((name, ..), image))| *name != image.name.as_bytes())
    {
        let detail = format!(
            "image {number}, counted from 1, is {} here and {} in {}",
            excerpt(name),
            excerpt(image.name.as_bytes()),
            list.display()
        );
        return Err(IjbError::file(&file.path, detail));
    }
    let ids = TemplateIds::new(rows.iter().map(|&(_, template, _)| template).collect());
    let place = |&(_, template, media): &(&[u8], u32, u32)| {
        ids.index(template).map(|template| Membership { template, media })
    };
    let memberships: Option<Vec<Membership>> = rows.iter().map(place).collect();
    Ok((memberships.expect("every id was just put in"), ids))
}

/// The list of pairs.
pub fn read_pairs(layout: &Layout, ids: &TemplateIds) -> Result<Pairs, IjbError> {
    let file = MetaFile::open(layout.pairs())?;
    let blocks = blocks(&file.bytes, BLOCK);
    let parsed: Vec<Result<Pairs, (usize, String)>> =
        blocks.par_iter().map(|block| parse_pairs(block, ids)).collect();
    let mut all = Pairs::default();
    for (index, part) in parsed.into_iter().enumerate() {
        let part = part.map_err(|(line, detail)| {
            let newlines = |block: &&[u8]| block.iter().filter(|&&b| b == b'\n').count();
            let before: usize = blocks[..index].iter().map(newlines).sum();
            file.error(before + line, detail)
        })?;
        all.first.extend(part.first);
        all.second.extend(part.second);
        all.same.extend(part.same);
    }
    let same = all.same.iter().filter(|&&same| same).count();
    match (same, all.same.len() - same) {
        (0, _) => Err(IjbError::file(&file.path, "has no pair of the same person")),
        (_, 0) => Err(IjbError::file(&file.path, "has no pair of different persons")),
        _ => Ok(all),
    }
}

/// The pairs of a part of the file; an error has its line within the part.
fn parse_pairs(bytes: &[u8], ids: &TemplateIds) -> Result<Pairs, (usize, String)> {
    let mut pairs = Pairs::default();
    for (line, text) in lines(bytes) {
        let (first, second, same) = parse_pair(text, ids).map_err(|detail| (line, detail))?;
        pairs.first.push(first);
        pairs.second.push(second);
        pairs.same.push(same);
    }
    Ok(pairs)
}

fn parse_pair(line: &[u8], ids: &TemplateIds) -> Result<(u32, u32, bool), String> {
    let [first, second, same] = columns::<3>(line)?;
    let template = |text: &[u8]| known(number(text, "template")?, ids);
    let same = match same {
        b"0" => false,
        b"1" => true,
        other => return Err(format!("label {:?} is neither 0 nor 1", excerpt(other))),
    };
    Ok((template(first)?, template(second)?, same))
}

/// Index of a template that must have images.
fn known(id: u32, ids: &TemplateIds) -> Result<u32, String> {
    ids.index(id)
        .ok_or_else(|| format!("template {id} has no image in face_tid_mid.txt"))
}

/// Pieces of about `size` bytes that end with a line.
fn blocks(mut bytes: &[u8], size: usize) -> Vec<&[u8]> {
    let mut blocks = Vec::new();
    while !bytes.is_empty() {
        let rest = bytes.get(size..).unwrap_or_default();
        let end = rest.iter().position(|&b| b == b'\n');
        let (block, after) = bytes.split_at(end.map_or(bytes.len(), |end| size + end + 1));
        blocks.push(block);
        bytes = after;
    }
    blocks
}

/// Templates of a gallery or of the probes with their subjects, sorted by template. The file has a line per image,
/// of which the first two columns count, under a line of headings.
pub fn read_entries(path: &Path, ids: &TemplateIds) -> Result<Vec<Entry>, IjbError> {
    let file = MetaFile::open(path.to_owned())?;
    let mut subjects = vec![None; ids.ids().len()];
    for (line, text) in lines(&file.bytes).skip(1) {
        let entry = parse_entry(text, ids).map_err(|detail| file.error(line, detail))?;
        let known = subjects[entry.template as usize].get_or_insert(entry.subject);
        if *known != entry.subject {
            let detail = format!(
                "template {} is subject {} here and {known} above",
                ids.ids()[entry.template as usize],
                entry.subject
            );
            return Err(file.error(line, detail));
        }
    }
    let entries: Vec<Entry> = (0..)
        .zip(subjects)
        .filter_map(|(template, subject)| {
            Some(Entry {
                template,
                subject: subject?,
            })
        })
        .collect();
    match entries.is_empty() {
        true => Err(IjbError::file(path, "lists no template")),
        false => Ok(entries),
    }
}

/// Refuses lists that do not agree on who a template is.
pub fn check_subjects(lists: &[(PathBuf, &[Entry])], ids: &TemplateIds) -> Result<(), IjbError> {
    let mut known: Vec<Option<(u32, &Path)>> = vec![None; ids.ids().len()];
    for (path, entries) in lists {
        for entry in *entries {
            let slot = &mut known[entry.template as usize];
            let (subject, first) = *slot.get_or_insert((entry.subject, path));
            if subject != entry.subject {
                let detail = format!(
                    "template {} is subject {} here and {subject} in {}",
                    ids.ids()[entry.template as usize],
                    entry.subject,
                    first.display()
                );
                return Err(IjbError::file(path, detail));
            }
        }
    }
    Ok(())
}

fn parse_entry(line: &[u8], ids: &TemplateIds) -> Result<Entry, String> {
    let mut columns = line.split(|&b| b == b',').map(<[u8]>::trim_ascii);
    let (Some(template), Some(subject)) = (columns.next(), columns.next()) else {
        return Err("1 column, expected template and subject".into());
    };
    Ok(Entry {
        template: known(number(template, "template")?, ids)?,
        subject: number(subject, "subject")?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Protocol;
    use super::*;
    use std::fs;

    struct Scratch(tempfile::TempDir);

    impl Scratch {
        fn new() -> (Self, Layout) {
            let dir = tempfile::tempdir().expect("scratch");
            fs::create_dir(dir.path().join("meta")).expect("made");
            let layout = Layout::find(dir.path(), Protocol::Ijbc).expect("found");
            (Self(dir), layout)
        }

        fn write(&self, path: &Path, text: impl AsRef<[u8]>) {
            assert!(path.starts_with(self.0.path()));
            fs::write(path, text).expect("written");
        }
    }

    /// What is said about the file, without the folder.
    fn said<T: std::fmt::Debug>(result: Result<T, IjbError>) -> String {
        let text = result.expect_err("refused").to_string();
        text.rsplit_once("meta/ijbc_").expect("a file").1.to_owned()
    }

    const IMAGE: &str = "1.jpg 1 2 3 4 5 6 7 8 9 10 0.5";

    #[test]
    fn what_is_well_formed_is_read() {
        let (scratch, layout) = Scratch::new();
        scratch.write(&layout.images(), format!("{IMAGE}\r\n\n2.png\t{}\n", &IMAGE[6..]));
        let images = read_images(&layout).expect("read");
        assert_eq!((images.len(), images[1].name.as_str()), (2, "2.png"));
        assert_eq!(
            images[0].landmarks,
            [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0]]
        );
        assert_eq!(images[0].faceness, 0.5);

        scratch.write(&layout.memberships(), "1.jpg 4294967295 9\n2.png 7 9\n");
        let (memberships, ids) = read_memberships(&layout, &images).expect("read");
        assert_eq!(ids.ids(), [7, u32::MAX]);
        assert_eq!(
            memberships[0],
            Membership {
                template: 1,
                media: 9
            }
        );
        assert_eq!(
            (ids.index(7), ids.index(8), ids.index(TABLE)),
            (Some(0), None, None)
        );

        scratch.write(&layout.pairs(), "7 4294967295 0\n7 7 1\n");
        let pairs = read_pairs(&layout, &ids).expect("read");
        let expected = Pairs {
            first: vec![0, 0],
            second: vec![1, 0],
            same: vec![false, true],
        };
        assert_eq!(pairs, expected);

        scratch.write(
            &layout.probes(),
            "T,S,\"a,b\"\n4294967295,3,x\n7,2,x\n7,2,\"y,z\"\n",
        );
        let entries = read_entries(&layout.probes(), &ids).expect("read");
        let expected = [
            Entry {
                template: 0,
                subject: 2,
            },
            Entry {
                template: 1,
                subject: 3,
            },
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let (scratch, layout) = Scratch::new();
        let long = format!("1.jpg {} 2", "9".repeat(1 << 20));
        for (text, expected) in [
            ("", "name_5pts_score.txt: lists no image"),
            ("1.jpg 0.5", "name_5pts_score.txt:1: 2 columns, expected 12"),
            (
                &format!("{IMAGE}\n\n{IMAGE}\n{IMAGE} 3\n"),
                "name_5pts_score.txt:4: 13 columns, expected 12",
            ),
            (
                &IMAGE.replace(" 7 ", " seven "),
                "coordinate \"seven\" is not a finite number",
            ),
            (
                &IMAGE.replace("0.5", "nan"),
                "faceness \"nan\" is not a finite number",
            ),
        ] {
            scratch.write(&layout.images(), text);
            let said = said(read_images(&layout));
            assert!(said.ends_with(expected), "{said}");
        }
        scratch.write(&layout.images(), b"\xff\xfe 1 2 3 4 5 6 7 8 9 10 0.5\n");
        assert!(said(read_images(&layout)).contains("is not UTF-8"));

        scratch.write(&layout.images(), format!("{IMAGE}\n"));
        let images = read_images(&layout).expect("read");
        for (text, expected) in [
            ("1.jpg 1 2\n2.jpg 1 2\n", "lists 2 images, but"),
            (
                "7.jpg 1 2\n",
                "image 1, counted from 1, is 7.jpg here and 1.jpg in ",
            ),
            ("1.jpg 1", ":1: 2 columns, expected 3"),
            ("1.jpg -1 2", ":1: template \"-1\" is not a whole number"),
            (
                "1.jpg 1 4294967296",
                "media \"4294967296\" is not a whole number from 0 to 4294967295",
            ),
            (long.as_str(), "99999999...\" is not a whole number"),
        ] {
            scratch.write(&layout.memberships(), text);
            let error = read_memberships(&layout, &images)
                .expect_err("refused")
                .to_string();
            assert!(error.contains(expected) && error.len() < 1000, "{error}");
        }

        scratch.write(&layout.memberships(), "1.jpg 5 2\n");
        let (_, ids) = read_memberships(&layout, &images).expect("read");
        for (text, expected) in [
            ("", "template_pair_label.txt: has no pair of the same person"),
            (
                "5 5 1\n",
                "template_pair_label.txt: has no pair of different persons",
            ),
            (
                "5 5 1\n5 6 0\n",
                ":2: template 6 has no image in face_tid_mid.txt",
            ),
            ("5 5 1\n5 5 2\n", ":2: label \"2\" is neither 0 nor 1"),
            ("5 5\n", ":1: 2 columns, expected 3"),
        ] {
            scratch.write(&layout.pairs(), text);
            let said = said(read_pairs(&layout, &ids));
            assert!(said.ends_with(expected), "{said}");
        }
        for (text, expected) in [
            ("head\n", "lists no template"),
            ("head\n5\n", ":2: 1 column, expected template and subject"),
            (
                "head\n5,1\n\n5,2\n",
                ":4: template 5 is subject 2 here and 1 above",
            ),
            ("head\n6,1\n", ":2: template 6 has no image in face_tid_mid.txt"),
        ] {
            scratch.write(&layout.probes(), text);
            let said = said(read_entries(&layout.probes(), &ids));
            assert!(said.ends_with(expected), "{said}");
        }
        fs::remove_file(layout.probes()).expect("removed");
        assert!(said(read_entries(&layout.probes(), &ids)).contains("No such file"));
    }

    #[test]
    fn lists_agree_on_who_a_template_is() {
        let ids = TemplateIds::new(vec![40, 50]);
        let entry = |template, subject| Entry { template, subject };
        let (one, other) = ([entry(0, 1), entry(1, 2)], [entry(1, 3)]);
        let lists = [("g1.csv".into(), &one[..]), ("g2.csv".into(), &one[..1])];
        check_subjects(&lists, &ids).expect("the same");
        let lists = [("g1.csv".into(), &one[..]), ("probes.csv".into(), &other[..])];
        let error = check_subjects(&lists, &ids).expect_err("another").to_string();
        assert_eq!(error, "probes.csv: template 50 is subject 3 here and 2 in g1.csv");
    }

    #[test]
    fn blocks_end_with_lines_and_errors_keep_their_line() {
        let text = b"aaa\nbb\n\ncccccccc\nd";
        for size in 0..30 {
            let blocks = blocks(text, size);
            assert_eq!(blocks.concat(), text);
            let (last, whole) = blocks.split_last().expect("some");
            assert!(whole.iter().all(|block| block.ends_with(b"\n")) && !last.is_empty());
        }
        // An error far behind the first block.
        let (scratch, layout) = Scratch::new();
        scratch.write(&layout.images(), IMAGE);
        scratch.write(&layout.memberships(), "1.jpg 5 2\n");
        let images = read_images(&layout).expect("read");
        let (_, ids) = read_memberships(&layout, &images).expect("read");
        let many = BLOCK / 6 * 2;
        scratch.write(&layout.pairs(), "5 5 1\n".repeat(many) + "5 5 x\n");
        let expected = format!(":{}: label \"x\" is neither 0 nor 1", many + 1);
        assert!(said(read_pairs(&layout, &ids)).ends_with(&expected));
    }
}
