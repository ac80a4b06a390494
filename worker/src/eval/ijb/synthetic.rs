//! Drawn benchmarks of any size in the real layout, for measurements and tests. A file is a function of the sizes and
//! the seed alone.
//!
//! A person is a random direction, an image that direction and noise. Images lie in the list as in IJB: template after
//! template, a part of them frames of a video. The first templates are galleries, the rest probes.

use super::{IjbError, Layout, Protocol};
use crate::{
    export::{FileError, atomic},
    random::{self, Draws, Purpose},
};
use rayon::prelude::*;
use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// Sizes of a drawn benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Images, at least one a template.
    pub images: u32,
    /// Templates; a sixth of them are galleries, a person each.
    pub templates: u32,
    /// Comparisons; every probe is compared with its own gallery template, the rest are drawn.
    pub pairs: u32,
    /// Values of a feature.
    pub dim: u32,
    /// Seed.
    pub seed: u64,
}

impl Sizes {
    /// Those of IJB-C.
    pub const IJBC: Self = Self {
        images: 469_375,
        templates: 23_124,
        pairs: 15_658_489,
        dim: 512,
        seed: 2048,
    };

    /// Persons, each with a gallery template.
    fn subjects(&self) -> u32 {
        // IJB-C has 3,531 of 23,124.
        (self.templates / 6).clamp(1, self.templates)
    }

    fn subject(&self, template: u32) -> u32 {
        template % self.subjects()
    }

    /// Ids are not consecutive, as in the real lists.
    fn id(&self, template: u32) -> u32 {
        3 + 5 * template
    }

    /// Noise of an image in lengths of a person's direction. Cosines of different persons scatter by 1 / sqrt(dim);
    /// those of the same are to be a few times that, so that the curves are neither trivial nor hopeless.
    fn noise(&self) -> f32 {
        let of_template = (self.dim as f32).sqrt() / 1.5 - 1.0;
        let images = self.images as f32 / self.templates as f32;
        (of_template.max(0.25) * images).sqrt()
    }

    /// Template of an image: all have as many images as divides.
    fn template(&self, image: u32) -> u32 {
        (u64::from(image) * u64::from(self.templates) / u64::from(self.images)) as u32
    }
}

/// Writes the lists of IJB-C into `root`, and `features.safetensors`, whose path is returned.
pub fn write(root: &Path, sizes: &Sizes) -> Result<PathBuf, IjbError> {
    let meta = root.join("IJBC/meta");
    fs::create_dir_all(&meta).map_err(IjbError::io(&meta))?;
    let layout = Layout::find(root, Protocol::Ijbc)?;
    let draws = Draws::new(sizes.seed, Purpose::Synthetic, 0);
    put(&layout.images(), |out| {
        (0..sizes.images).try_for_each(|image| {
            let faceness = 500 + draws.bits(image.into()) % 500;
            writeln!(
                out,
                "{}.jpg 38.3 51.7 73.5 51.5 56.0 71.7 41.5 92.4 70.7 92.2 0.{faceness}",
                image + 1
            )
        })
    })?;
    put(&layout.memberships(), |out| {
        (0..sizes.images).try_for_each(|image| {
            // Four frames of one video, then four photographs.
            let media = if image % 8 < 4 { image - image % 8 } else { image };
            writeln!(
                out,
                "{}.jpg {} {}",
                image + 1,
                sizes.id(sizes.template(image)),
                media + 1
            )
        })
    })?;
    put(&layout.pairs(), |out| pairs(sizes, out))?;
    let half = sizes.subjects().div_ceil(2);
    let [first, second] = layout.galleries();
    put(&first, |out| entries(sizes, 0..half, out))?;
    put(&second, |out| entries(sizes, half..sizes.subjects(), out))?;
    put(&layout.probes(), |out| {
        entries(sizes, sizes.subjects()..sizes.templates, out)
    })?;
    let path = root.join("features.safetensors");
    put(&path, |out| features(sizes, out))?;
    Ok(path)
}

fn put(path: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> Result<(), IjbError> {
    let written = atomic::write(path, |file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        out.flush()
    });
    written.map_err(|error| match error {
        FileError::Io { path, source } => IjbError::Io { path, source },
        FileError::Malformed { path, what, .. } => IjbError::File { path, detail: what },
    })
}

fn pairs(sizes: &Sizes, out: &mut impl Write) -> io::Result<()> {
    let subjects = sizes.subjects();
    let probes = sizes.templates - subjects;
    let draws = Draws::new(sizes.seed, Purpose::Synthetic, 1);
    for pair in 0..sizes.pairs {
        let bits = draws.bits(pair.into());
        let (gallery, probe) = match pair {
            own if own < probes => (sizes.subject(subjects + own), subjects + own),
            _ => (
                (bits as u32) % subjects,
                subjects + ((bits >> 32) as u32) % probes.max(1),
            ),
        };
        let probe = probe.min(sizes.templates - 1);
        let same = u8::from(sizes.subject(probe) == gallery);
        writeln!(out, "{} {} {same}", sizes.id(gallery), sizes.id(probe))?;
    }
    Ok(())
}

fn entries(sizes: &Sizes, templates: std::ops::Range<u32>, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "TEMPLATE_ID,SUBJECT_ID,FILENAME")?;
    for template in templates {
        writeln!(
            out,
            "{},{},1.jpg",
            sizes.id(template),
            100 + sizes.subject(template)
        )?;
    }
    Ok(())
}

/// A safetensors file, written row by row.
fn features(sizes: &Sizes, out: &mut impl Write) -> io::Result<()> {
    let (images, dim) = (u64::from(sizes.images), u64::from(sizes.dim));
    let bytes = images * dim * 4;
    let tensor = |start: u64| {
        format!(
            r#"{{"dtype":"F32","shape":[{images},{dim}],"data_offsets":[{start},{}]}}"#,
            start + bytes
        )
    };
    let mut header = format!(r#"{{"feat":{},"feat_flip":{}}}"#, tensor(0), tensor(bytes)).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for flip in [0, 1] {
        for first in (0..sizes.images).step_by(4096) {
            let rows: Vec<Vec<u8>> = (first..sizes.images.min(first + 4096))
                .into_par_iter()
                .map(|image| feature(sizes, image, flip))
                .collect();
            rows.iter().try_for_each(|row| out.write_all(row))?;
        }
    }
    Ok(())
}

/// The mirror image has noise of its own.
fn feature(sizes: &Sizes, image: u32, flip: u64) -> Vec<u8> {
    let subject = sizes.subject(sizes.template(image));
    let person = Draws::new(sizes.seed, Purpose::Synthetic, 1 << 32 | u64::from(subject));
    let noise = Draws::new(
        random::mix(sizes.seed ^ flip),
        Purpose::Synthetic,
        2 << 32 | u64::from(image),
    );
    // 24 bits to [-1, 1).
    let centred = |bits: u64| (bits >> 40) as f32 / 8_388_608.0 - 1.0;
    let loudness = sizes.noise();
    let value = |i: u64| centred(person.bits(i)) + loudness * centred(noise.bits(i));
    (0..u64::from(sizes.dim))
        .flat_map(|i| value(i).to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Benchmark, FeatureFile, Options, Settings, evaluate, report};
    use super::*;

    const SMALL: Sizes = Sizes {
        images: 600,
        templates: 120,
        pairs: 3000,
        dim: 16,
        seed: 3,
    };

    #[test]
    fn a_drawn_benchmark_can_be_evaluated() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = write(dir.path(), &SMALL).expect("written");
        let layout = Layout::find(dir.path(), Protocol::Ijbc).expect("found");
        let benchmark = Benchmark::open(layout, true).expect("read");
        let features = FeatureFile::open(&path).expect("opened");
        let options = Options {
            settings: Settings::REFERENCE,
            all_settings: true,
            repetitions: 50,
            seed: 1,
        };
        let mut phases = Vec::new();
        let found =
            evaluate(&benchmark, &features, &options, &mut |phase| phases.push(phase)).expect("evaluated");
        assert_eq!(
            (found.templates, found.pairs, found.subjects, phases.len()),
            (120, 3000, 20, 6)
        );
        // Neither hopeless nor perfect, and the interval holds the rate.
        assert!(
            (0.6..0.999).contains(&found.verification.roc.auc),
            "{}",
            found.verification.roc.auc
        );
        let tar = found.tar[5];
        let interval = tar.interval.expect("drawn");
        assert!(interval.low < tar.tar && tar.tar < interval.high, "{tar:?}");
        assert_eq!(found.all_settings[4].tpr, found.verification.tpr);

        let json = report::json(&found);
        assert_eq!(json["identification"]["far"].as_array().map(Vec::len), Some(101));
        assert!(
            json["identification"]["joined"]["dir_at_far"]["0.1"]["rate"].is_f64(),
            "{json}"
        );
        assert_eq!(json["settings"].as_object().map(|s| s.len()), Some(8));
        for text in [report::table(&found), report::markdown(&found)] {
            assert!(
                text.contains("N0D1F1, nearest FPR") && text.contains("top-10"),
                "{text}"
            );
        }
        // The same files again, to the bit.
        let again = tempfile::tempdir().expect("scratch");
        let second = write(again.path(), &SMALL).expect("written");
        assert_eq!(fs::read(path).expect("read"), fs::read(second).expect("read"));
    }
}
