//! Where a benchmark keeps its files: `<root>/IJBC/meta/ijbc_*.txt` and the like.

use super::IjbError;
use std::{
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// IARPA Janus Benchmark B (Whitelam et al. 2017).
    Ijbb,
    /// IARPA Janus Benchmark C (Maze et al. 2018).
    Ijbc,
}

impl Protocol {
    /// Every protocol with its name on the command line.
    pub const ALL: [(&str, Self); 2] = [("ijbb", Self::Ijbb), ("ijbc", Self::Ijbc)];

    /// Folder of the benchmark.
    fn folder(self) -> &'static str {
        match self {
            Self::Ijbb => "IJBB",
            Self::Ijbc => "IJBC",
        }
    }

    /// Start of the names of its meta files.
    fn prefix(self) -> &'static str {
        match self {
            Self::Ijbb => "ijbb",
            Self::Ijbc => "ijbc",
        }
    }

    /// Names of its two galleries of the 1:N protocol.
    pub fn galleries(self) -> [&'static str; 2] {
        match self {
            Self::Ijbb => ["S1", "S2"],
            Self::Ijbc => ["G1", "G2"],
        }
    }

    /// Name on the command line of another benchmark, whose lists are under `root` where this one's are not: the one that
    /// was probably meant.
    pub fn meant_instead(self, root: &Path) -> Option<&'static str> {
        let is_there = |protocol| Layout::find(root, protocol).is_ok_and(|layout| layout.images().is_file());
        let mut there = Self::ALL.into_iter().filter(|(_, protocol)| is_there(*protocol));
        there
            .next()
            .filter(|(_, found)| *found != self && !is_there(self))
            .map(|(name, _)| name)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ijbb => "IJB-B",
            Self::Ijbc => "IJB-C",
        })
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|(known, _)| *known == name);
        known
            .map(|(_, protocol)| *protocol)
            .ok_or_else(|| "is neither ijbb (IJB-B) nor ijbc (IJB-C)".into())
    }
}

/// The files of a benchmark on disk. Nothing but the meta folder is known to exist.
#[derive(Clone, Debug)]
pub struct Layout {
    protocol: Protocol,
    folder: PathBuf,
}

impl Layout {
    /// The benchmark under `root`, which holds the folder `IJBB` or `IJBC`, or is that folder.
    pub fn find(root: &Path, protocol: Protocol) -> Result<Self, IjbError> {
        let candidates = [root.join(protocol.folder()), root.to_owned()];
        match candidates.into_iter().find(|folder| folder.join("meta").is_dir()) {
            Some(folder) => Ok(Self { protocol, folder }),
            None => Err(IjbError::Io {
                path: root.to_owned(),
                source: io::Error::new(
                    io::ErrorKind::NotFound,
                    format!(
                        "there is neither {}/meta nor meta in this folder",
                        protocol.folder()
                    ),
                ),
            }),
        }
    }

    /// Which benchmark it is.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    fn meta(&self, rest: &str) -> PathBuf {
        self.folder
            .join("meta")
            .join(format!("{}_{rest}", self.protocol.prefix()))
    }

    /// A line per image: name, five landmarks, faceness.
    pub fn images(&self) -> PathBuf {
        self.meta("name_5pts_score.txt")
    }

    /// A line per image: name, template, media.
    pub fn memberships(&self) -> PathBuf {
        self.meta("face_tid_mid.txt")
    }

    /// A line per comparison: two templates, 1 if they are the same person.
    pub fn pairs(&self) -> PathBuf {
        self.meta("template_pair_label.txt")
    }

    /// Templates and subjects of each gallery.
    pub fn galleries(&self) -> [PathBuf; 2] {
        self.protocol
            .galleries()
            .map(|name| self.meta(&format!("1N_gallery_{name}.csv")))
    }

    /// Templates and subjects that are searched for in the galleries.
    pub fn probes(&self) -> PathBuf {
        self.meta("1N_probe_mixed.csv")
    }

    /// Folder of the images.
    pub fn loose_crop(&self) -> PathBuf {
        self.folder.join("loose_crop")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_root_is_the_benchmark_or_the_folder_above() {
        let dir = tempfile::tempdir().expect("scratch");
        let missing = Layout::find(dir.path(), Protocol::Ijbc).expect_err("empty");
        assert!(
            missing.to_string().contains("neither IJBC/meta nor meta"),
            "{missing}"
        );
        fs::create_dir_all(dir.path().join("IJBC/meta")).expect("made");
        for root in [dir.path().to_owned(), dir.path().join("IJBC")] {
            let layout = Layout::find(&root, Protocol::Ijbc).expect("found");
            let expected = dir.path().join("IJBC/meta/ijbc_1N_gallery_G2.csv");
            assert_eq!(layout.galleries()[1], expected);
        }
        assert!(Layout::find(dir.path(), Protocol::Ijbb).is_err());
        // With lists it is the one that was meant, however it is named.
        assert_eq!(Protocol::Ijbb.meant_instead(dir.path()), None);
        fs::write(dir.path().join("IJBC/meta/ijbc_name_5pts_score.txt"), "").expect("written");
        for root in [dir.path().to_owned(), dir.path().join("IJBC")] {
            let meant = [Protocol::Ijbb, Protocol::Ijbc].map(|wrong| wrong.meant_instead(&root));
            assert_eq!(meant, [Some("ijbc"), None], "{}", root.display());
        }
        assert_eq!("ijbb".parse(), Ok(Protocol::Ijbb));
        assert!("ijba".parse::<Protocol>().is_err());
    }
}
