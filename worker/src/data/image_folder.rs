//! A folder of JPEG and PNG files as a data set: one sub-folder an identity, numbered in the order of their names, or a
//! list `label.txt` with lines `path<TAB>label` at its root. Hidden files (`.DS_Store`) and other files are ignored.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use super::{DataError, Dataset, Image, Record, decode::OtherSize, image_list};

/// Name of the list at the root of a folder that is not sorted into identities.
pub const LIST: &str = "label.txt";
/// Largest image file that is read, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Images below a folder.
#[derive(Debug)]
pub struct ImageFolder {
    root: PathBuf,
    entries: Vec<Entry>,
    num_classes: u32,
    names: Option<Vec<String>>,
}

/// One file and its identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The image, relative to the data set's root.
    pub path: PathBuf,
    /// Identity.
    pub label: u32,
}

impl ImageFolder {
    /// Opens `root`: by its list if it has one, else by its sub-folders.
    pub fn open(root: &Path) -> Result<Self, DataError> {
        match root.join(LIST) {
            list if list.is_file() => Self::open_list(&list),
            _ => Self::open_folders(root),
        }
    }

    /// Opens a list ([`image_list`]); its paths are relative to the list's folder and stay inside it.
    pub fn open_list(list: &Path) -> Result<Self, DataError> {
        Self::open_list_in(list, list.parent().unwrap_or(Path::new("")))
    }

    /// The same with paths relative to another folder.
    pub fn open_list_in(list: &Path, root: &Path) -> Result<Self, DataError> {
        let text = fs::read_to_string(list).map_err(|e| DataError::io(list, e))?;
        let entries = image_list::parse(&text, root).map_err(|message| DataError::format(list, message))?;
        Self::from_entries(root.to_owned(), entries, None)
            .ok_or_else(|| DataError::format(list, "the list is empty"))
    }

    fn open_folders(root: &Path) -> Result<Self, DataError> {
        let (mut entries, mut names) = (Vec::new(), Vec::new());
        let folders = visible(root)?.into_iter().filter(|name| root.join(name).is_dir());
        for (label, folder) in (0u32..).zip(folders) {
            let images: Vec<PathBuf> = visible(&root.join(&folder))?
                .into_iter()
                .filter(|name| is_image(name))
                .collect();
            if images.is_empty() {
                let message = "has no JPEG or PNG files, but each folder here is an identity";
                return Err(DataError::format(&root.join(&folder), message));
            }
            names.push(folder.to_string_lossy().into_owned());
            entries.extend(images.into_iter().map(|name| Entry {
                path: folder.join(name),
                label,
            }));
        }
        Self::from_entries(root.into(), entries, Some(names)).ok_or_else(|| {
            let message = format!(
                "neither train.rec and train.idx, nor {LIST}, nor a folder of images for each identity"
            );
            DataError::format(root, message)
        })
    }

    fn from_entries(root: PathBuf, entries: Vec<Entry>, names: Option<Vec<String>>) -> Option<Self> {
        let num_classes = entries.iter().map(|entry| entry.label).max()?.saturating_add(1);
        Some(Self {
            root,
            entries,
            num_classes,
            names,
        })
    }

    /// Folder that the entries' paths are relative to.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Files and identities, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Names of the identities by label, where they are folders.
    pub fn names(&self) -> Option<&[String]> {
        self.names.as_deref()
    }

    fn entry(&self, index: u64) -> Option<&Entry> {
        self.entries.get(usize::try_from(index).ok()?)
    }
}

impl Dataset for ImageFolder {
    fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    fn num_classes(&self) -> u32 {
        self.num_classes
    }

    fn describe(&self) -> String {
        format!(
            "image folder {}: {} images of {} identities",
            self.root.display(),
            self.len(),
            self.num_classes
        )
    }

    fn name(&self, index: u64) -> String {
        match self.entry(index) {
            Some(entry) => self.root.join(&entry.path).display().to_string(),
            None => format!("{}: image {index}", self.root.display()),
        }
    }

    fn record(&self, index: u64) -> Result<Record<'_>, DataError> {
        let entry = self
            .entry(index)
            .ok_or_else(|| DataError::record(self.name(index), "there is no such image"))?;
        Ok(Record {
            label: entry.label,
            image: Image::Encoded(
                read_image_file(&self.root.join(&entry.path))?.into(),
                OtherSize::Resize,
            ),
        })
    }
}

/// The bytes of one image file.
pub fn read_image_file(path: &Path) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|e| DataError::io(path, e))?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(DataError::format(
            path,
            format!("is larger than {MAX_FILE} bytes"),
        )),
        false => Ok(bytes),
    }
}

/// Names in a folder that are not hidden, sorted.
fn visible(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| DataError::io(folder, e))? {
        let name = entry.map_err(|e| DataError::io(folder, e))?.file_name();
        if !name.as_encoded_bytes().starts_with(b".") {
            names.push(PathBuf::from(name));
        }
    }
    names.sort();
    Ok(names)
}

fn is_image(name: &Path) -> bool {
    let extension = name.extension().unwrap_or_default();
    ["jpg", "jpeg", "png"]
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(root: &Path, names: &[&str]) {
        for name in names {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        }
    }

    #[test]
    fn folders_are_identities_in_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        touch(
            dir.path(),
            &[
                "b/2.JPG",
                "b/1.png",
                "a/9.jpeg",
                "a/.DS_Store",
                ".DS_Store",
                ".git/1.jpg",
                "readme.txt",
                "b/notes.txt",
            ],
        );
        let set = ImageFolder::open(dir.path()).unwrap();
        let found: Vec<_> = set
            .entries()
            .iter()
            .map(|e| (e.path.to_str().unwrap(), e.label))
            .collect();
        assert_eq!(found, [("a/9.jpeg", 0), ("b/1.png", 1), ("b/2.JPG", 1)]);
        assert_eq!((set.len(), set.num_classes()), (3, 2));
        touch(dir.path(), &["c/.hidden.jpg"]);
        let error = ImageFolder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("c: has no JPEG or PNG files"), "{error}");
    }

    #[test]
    fn a_list_comes_before_folders() {
        let dir = tempfile::tempdir().unwrap();
        touch(dir.path(), &["images/2.jpg", "images/1.jpg"]);
        let list = dir.path().join(LIST);
        let open = |text: &str| {
            fs::write(&list, text).unwrap();
            ImageFolder::open(dir.path()).map_err(|e| e.to_string())
        };
        let set = open("images/2.jpg\t0\nimages/1.jpg\t3\n").unwrap();
        assert_eq!((set.len(), set.num_classes()), (2, 4));
        for (text, expected) in [
            (
                "images/1.jpg 0\n",
                "line 1: \"images/1.jpg 0\" is not \"path<TAB>label\"",
            ),
            ("images/1.jpg\t-1\n", "line 1: label \"-1\" is not a class number"),
            (
                "images/1.jpg\t0\n../x.jpg\t0\n",
                "line 2: ../x.jpg leaves the folder",
            ),
            ("\n", "the list is empty"),
        ] {
            let error = open(text).unwrap_err();
            assert!(error.ends_with(expected), "{error}");
        }
    }

    #[test]
    fn a_missing_image_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LIST), "gone.jpg\t0\n").unwrap();
        let set = ImageFolder::open(dir.path()).unwrap();
        let error = set.record(0).unwrap_err().to_string();
        assert!(error.ends_with("gone.jpg: no such file or folder"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        assert!(
            ImageFolder::open(empty.path())
                .unwrap_err()
                .to_string()
                .contains("neither train.rec")
        );
    }
}
