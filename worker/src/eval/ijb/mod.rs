//! IJB-B and IJB-C: sets of images of one person (templates) are compared 1:1 and searched 1:N. The numbers are those
//! of InsightFace's `eval_ijbc.py`, `ijb_evals.py` and `ijb_1n.py`; beside them rates at the very false accept rate,
//! with intervals.
//!
//! The way of the data: [`meta`] reads the lists, [`features`] gives a feature per image (from a file, or from a
//! network through [`embed`]), [`templates`] makes one of a template and scores pairs, [`roc`], [`bootstrap`] and
//! [`identification`] are arithmetic on scores, [`report`] writes it down. [`synthetic`] makes sets of any size.

pub mod bootstrap;
pub mod embed;
mod error;
pub mod features;
pub mod identification;
mod layout;
pub mod meta;
pub mod report;
pub mod roc;
pub mod synthetic;
pub mod templates;

pub use error::IjbError;
pub use features::{FeatureFile, ImageFeatures};
pub use layout::{Layout, Protocol};
pub use templates::Settings;

use identification::{ClosedSet, OpenSet};
use meta::{Entry, Image, Pairs, TemplateIds};
use roc::{Comparison, Ranked, Roc};
use templates::{Members, Templates};

/// False accept rates at which rates are reported, as they are written.
pub const FARS: [(&str, f64); 6] = [
    ("1e-6", 1e-6),
    ("1e-5", 1e-5),
    ("1e-4", 1e-4),
    ("1e-3", 1e-3),
    ("1e-2", 1e-2),
    ("1e-1", 1e-1),
];

/// The lists of a benchmark, checked against each other. The pairs are read when they are needed.
#[derive(Debug)]
pub struct Benchmark {
    layout: Layout,
    images: Vec<Image>,
    ids: TemplateIds,
    members: Members,
    search: Option<Search>,
}

/// The lists of the 1:N protocol.
#[derive(Debug)]
struct Search {
    galleries: [Vec<Entry>; 2],
    probes: Vec<Entry>,
}

impl Search {
    fn open(layout: &Layout, ids: &TemplateIds) -> Result<Self, IjbError> {
        let ([first, second], probes) = (layout.galleries(), layout.probes());
        let found = Self {
            galleries: [
                meta::read_entries(&first, ids)?,
                meta::read_entries(&second, ids)?,
            ],
            probes: meta::read_entries(&probes, ids)?,
        };
        let [of_first, of_second] = found.galleries.each_ref().map(Vec::as_slice);
        let lists = [
            (first, of_first),
            (second, of_second),
            (probes, &found.probes[..]),
        ];
        meta::check_subjects(&lists, ids)?;
        Ok(found)
    }
}

impl Benchmark {
    /// Reads the lists of images and, if the files are there and `search` is set, of galleries and probes.
    pub fn open(layout: Layout, search: bool) -> Result<Self, IjbError> {
        let images = meta::read_images(&layout)?;
        let (memberships, ids) = meta::read_memberships(&layout, &images)?;
        let members = Members::of(&memberships, ids.ids().len());
        let [first, second] = layout.galleries();
        let is_there = [&first, &second, &layout.probes()]
            .iter()
            .any(|path| path.exists());
        let search = match search && is_there {
            true => Some(Search::open(&layout, &ids)?),
            false => None,
        };
        Ok(Self {
            layout,
            images,
            ids,
            members,
            search,
        })
    }

    /// Where it is on disk.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The images in the order of the list.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The template ids.
    pub fn ids(&self) -> &TemplateIds {
        &self.ids
    }

    /// That the images are where the list says: the folder, and of its images the first and the last. Each is decoded when
    /// it is needed.
    ///
    /// # Errors
    /// Which is not there.
    pub fn check_images(&self) -> Result<(), IjbError> {
        let folder = self.layout.loose_crop();
        let ends = [self.images.first(), self.images.last()];
        let ends = ends.into_iter().flatten().map(|image| folder.join(&image.name));
        for path in [folder.clone()].into_iter().chain(ends) {
            path.metadata().map_err(IjbError::io(&path))?;
        }
        Ok(())
    }

    /// The list of pairs.
    pub fn pairs(&self) -> Result<Pairs, IjbError> {
        meta::read_pairs(&self.layout, &self.ids)
    }

    /// One feature per template.
    pub fn pool(&self, features: &dyn ImageFeatures, settings: Settings) -> Result<Templates, IjbError> {
        let faceness: Vec<f32> = self.images.iter().map(|image| image.faceness).collect();
        templates::pool(features, &self.members, &faceness, settings)
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What becomes of the features of images.
    pub settings: Settings,
    /// Also the 1:1 numbers of all eight settings.
    pub all_settings: bool,
    /// Repetitions of the bootstrap; 0 leaves the intervals out.
    pub repetitions: u32,
    /// Seed of the bootstrap.
    pub seed: u64,
}

/// Rates of one setting as the reference gives them.
#[derive(Clone, Debug)]
pub struct Verification {
    /// What became of the features of images.
    pub settings: Settings,
    /// True accept rate at the nearest false accept rate, for each of [`FARS`].
    pub tpr: [f64; 6],
    /// The whole curve.
    pub roc: Roc,
}

/// True accept rate at a false accept rate, interpolated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tar {
    /// The rate.
    pub tar: f64,
    /// What repetitions with persons drawn anew give.
    pub interval: Option<bootstrap::Interval>,
    /// Comparisons of different persons that this rate accepts. Below 1 the set is too small for the rate, below about
    /// 30 it is a rough guess.
    pub false_accepts: f64,
}

/// Everything that is known of the features after an evaluation.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Which benchmark.
    pub protocol: Protocol,
    /// Images.
    pub images: usize,
    /// Templates.
    pub templates: usize,
    /// Comparisons.
    pub pairs: usize,
    /// Persons, as far as the list of pairs tells.
    pub subjects: u32,
    /// 1:1, under the chosen settings.
    pub verification: Verification,
    /// 1:1 under all eight, if asked for.
    pub all_settings: Vec<Verification>,
    /// For each of [`FARS`].
    pub tar: [Tar; 6],
    /// Repetitions behind the intervals.
    pub repetitions: u32,
    /// 1:N, if the lists are there.
    pub identification: Option<Identification>,
}

/// Numbers of the 1:N protocol.
#[derive(Clone, Debug)]
pub struct Identification {
    /// Probes.
    pub probes: usize,
    /// Rates of false alarms of the open searches.
    pub fars: Vec<f64>,
    /// A search in each gallery: its name, its templates, what was found.
    pub galleries: [(&'static str, usize, OpenSet); 2],
    /// A search in both as one, or why there is none.
    pub joined: Result<ClosedSet, String>,
}

/// Steps of an evaluation, for those who show or time them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading the list of pairs.
    Pairs,
    /// From images to templates.
    Pool,
    /// Scores of all pairs, sorted, and rates.
    Verify,
    /// Intervals of the rates.
    Bootstrap,
    /// Searches.
    Identify,
    /// The other settings.
    Settings,
}

impl Phase {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pairs => "pairs",
            Self::Pool => "pool",
            Self::Verify => "verify",
            Self::Bootstrap => "bootstrap",
            Self::Identify => "identify",
            Self::Settings => "settings",
        }
    }
}

/// Evaluates features, which must have one of each image. `begin` is told of each phase as it begins.
pub fn evaluate(
    benchmark: &Benchmark,
    features: &dyn ImageFeatures,
    options: &Options,
    begin: &mut dyn FnMut(Phase),
) -> Result<Evaluation, IjbError> {
    begin(Phase::Pairs);
    let pairs = benchmark.pairs()?;
    let (subject_of, subjects) = bootstrap::subjects(&pairs, benchmark.ids.ids().len());
    begin(Phase::Pool);
    let templates = benchmark.pool(features, options.settings)?;
    begin(Phase::Verify);
    let (ranked, verification) = verify(&templates, &pairs, &subject_of, options.settings);
    begin(Phase::Bootstrap);
    let repetitions = bootstrap::affordable(options.repetitions, pairs.same.len());
    let tar = rates(&ranked, subjects, repetitions, options.seed);
    drop(ranked);
    let identification = benchmark.search.as_ref().map(|search| {
        begin(Phase::Identify);
        identify(&templates, search, benchmark.layout.protocol())
    });
    let mut all_settings = Vec::new();
    if options.all_settings {
        begin(Phase::Settings);
        for settings in Settings::all()
            .into_iter()
            .filter(|s| !s.flip || features.has_flip())
        {
            let templates = benchmark.pool(features, settings)?;
            all_settings.push(verify(&templates, &pairs, &subject_of, settings).1);
        }
    }
    Ok(Evaluation {
        protocol: benchmark.layout.protocol(),
        images: benchmark.images.len(),
        templates: benchmark.ids.ids().len(),
        pairs: pairs.same.len(),
        subjects,
        verification,
        all_settings,
        tar,
        repetitions,
        identification,
    })
}

fn verify(
    templates: &Templates,
    pairs: &Pairs,
    subject_of: &[u32],
    settings: Settings,
) -> (Ranked, Verification) {
    let scores = templates.scores(pairs);
    let of_kind = |kind: bool| -> Vec<Comparison> {
        let compared = pairs
            .first
            .iter()
            .zip(&pairs.second)
            .zip(&scores)
            .zip(&pairs.same);
        compared
            .filter(|&(_, &same)| same == kind)
            .map(|(((&a, &b), &score), _)| Comparison {
                score,
                subjects: [subject_of[a as usize], subject_of[b as usize]],
            })
            .collect()
    };
    let ranked = Ranked::new(of_kind(true), of_kind(false));
    let roc = ranked.roc();
    let tpr = FARS.map(|(_, far)| roc.tpr_near(far));
    (ranked, Verification { settings, tpr, roc })
}

fn rates(ranked: &Ranked, subjects: u32, repetitions: u32, seed: u64) -> [Tar; 6] {
    let fars = FARS.map(|(_, far)| far);
    let totals = ranked.totals(|_| 1.0);
    let intervals = bootstrap::intervals(ranked, subjects, &fars, repetitions, seed);
    std::array::from_fn(|index| Tar {
        tar: ranked
            .tar_at(fars[index], totals, |_| 1.0)
            .expect("lists of pairs have both kinds"),
        interval: intervals[index],
        false_accepts: fars[index] * totals.impostor,
    })
}

fn identify(templates: &Templates, search: &Search, protocol: Protocol) -> Identification {
    let fars = identification::open_fars();
    let gallery = |index: usize| {
        let gallery = &search.galleries[index];
        let found = identification::open_set(templates, &search.probes, gallery, &fars);
        (protocol.galleries()[index], gallery.len(), found)
    };
    let joined = identification::join(&search.galleries);
    Identification {
        probes: search.probes.len(),
        galleries: [gallery(0), gallery(1)],
        joined: identification::closed_set(templates, &search.probes, &joined),
        fars,
    }
}
