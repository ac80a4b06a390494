//! Settings of a recipe as keys of a job file: the reference's defaults, what means something else here, and what
//! there is no key for.

use super::expression::Value;
use super::script::{Script, Setting};
use super::write::{Kind, clean, group, number, numbers, path, text, toml, whole};
use super::{Options, Remark};
use arcface_proto::convert::FieldViolation;
use std::fmt::Write;

/// A file of settings. Those of an earlier layer hide those of a later one.
pub struct Layer<'a> {
    /// The file's name.
    pub file: &'a str,
    /// What it sets.
    pub script: Script,
}

/// A line of the job file.
struct Entry {
    section: &'static str,
    key: &'static str,
    /// In TOML.
    value: String,
    /// Lines of comment above it.
    comments: Vec<String>,
    /// The reference's key.
    from: &'static str,
    /// File and line that set it.
    origin: Option<(String, usize)>,
}

/// A setting that was looked up.
struct Found {
    value: Option<Value>,
    origin: Option<(String, usize)>,
    comments: Vec<String>,
}

/// Keys that became keys of the job file, or whose meaning is dealt with one by one.
const CARRIED: [&str; 25] = [
    "batch_size",
    "dali",
    "dali_aug",
    "embedding_size",
    "fp16",
    "frequent",
    "gradient_acc",
    "interclass_filtering_threshold",
    "lr",
    "margin_list",
    "momentum",
    "network",
    "num_classes",
    "num_epoch",
    "num_image",
    "num_workers",
    "optimizer",
    "output",
    "rec",
    "sample_rate",
    "seed",
    "val_targets",
    "verbose",
    "warmup_epoch",
    "weight_decay",
];

/// What to do about an expression.
const WRITE_IT: &str = "write the number or text itself";

/// A job file in the making.
pub struct Job<'a> {
    layers: &'a [Layer<'a>],
    title: String,
    entries: Vec<Entry>,
    remarks: Vec<Remark>,
}

impl<'a> Job<'a> {
    /// The job of a recipe. Values are carried over as they are: whether they make a valid job is seen later.
    pub fn of(layers: &'a [Layer<'a>], options: &Options) -> Self {
        let mut job = Self {
            layers,
            title: String::new(),
            entries: Vec::new(),
            remarks: Vec::new(),
        };
        let world_size = job.world_size(options);
        job.output(&options.job);
        job.literal("job", "name", text(&options.job));
        job.literal("job", "world_size", whole(world_size.into()));
        job.plain("job", "seed", "seed", Kind::Whole, Some(Value::Whole(2048)));
        job.plain(
            "model",
            "network",
            "network",
            Kind::Text,
            Some(Value::Text("r50".into())),
        );
        job.plain(
            "model",
            "embedding_size",
            "embedding_size",
            Kind::Whole,
            Some(Value::Whole(512)),
        );
        let classes = job.plain("head", "num_classes", "num_classes", Kind::Whole, None);
        job.margin();
        job.sample_rate(classes, world_size);
        job.plain(
            "head",
            "interclass_filtering_threshold",
            "interclass_filtering_threshold",
            Kind::Number,
            Some(Value::Real(0.0)),
        );
        job.plain("data", "rec", "rec", Kind::Text, None);
        job.plain("data", "num_image", "num_image", Kind::Whole, None);
        job.num_workers();
        job.augment();
        let batch = job.plain(
            "train",
            "batch_size",
            "batch_size",
            Kind::Whole,
            Some(Value::Whole(128)),
        );
        job.num_epoch();
        job.warmup_epoch();
        job.plain(
            "train",
            "optimizer",
            "optimizer",
            Kind::Text,
            Some(Value::Text("sgd".into())),
        );
        job.plain("train", "lr", "lr", Kind::Number, Some(Value::Real(0.1)));
        job.plain(
            "train",
            "momentum",
            "momentum",
            Kind::Number,
            Some(Value::Real(0.9)),
        );
        job.plain(
            "train",
            "weight_decay",
            "weight_decay",
            Kind::Number,
            Some(Value::Real(5e-4)),
        );
        job.gradient_acc();
        job.precision();
        job.plain(
            "train",
            "frequent",
            "frequent",
            Kind::Whole,
            Some(Value::Whole(10)),
        );
        job.plain(
            "eval",
            "verbose",
            "verbose",
            Kind::Whole,
            Some(Value::Whole(2000)),
        );
        job.plain(
            "eval",
            "val_targets",
            "val_targets",
            Kind::Texts,
            Some(Value::List(Vec::new())),
        );
        job.rest();
        job.title(world_size, batch);
        job
    }

    /// The job file.
    pub fn text(&self) -> String {
        let mut text = self.title.clone();
        let mut section = "";
        for entry in &self.entries {
            if entry.section != section {
                section = entry.section;
                // Writing to a string does not fail.
                let _ = write!(text, "\n[{section}]\n");
            }
            for comment in &entry.comments {
                let _ = writeln!(text, "# {comment}");
            }
            let _ = writeln!(text, "{} = {}", entry.key, entry.value);
        }
        text
    }

    /// What there is to say, by file and line.
    pub fn into_remarks(self) -> Vec<Remark> {
        let mut remarks = self.remarks;
        for layer in self.layers {
            remarks.extend(layer.script.left_out.iter().map(|left| Remark {
                file: layer.file.into(),
                line: Some(left.line),
                text: left.text.clone(),
                hint: String::new(),
            }));
        }
        let place = |file: &str| self.layers.iter().position(|layer| layer.file == file);
        remarks.sort_by_key(|remark| (place(&remark.file), remark.line));
        remarks
    }

    /// What the loader found wrong, under the names and at the lines of the recipe.
    pub fn complaints(&self, violations: &[FieldViolation]) -> Vec<Remark> {
        violations
            .iter()
            .map(|violation| {
                let entry = self.entries.iter().find(|entry| {
                    violation
                        .path
                        .strip_prefix(&path(entry.section, entry.key))
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('['))
                });
                // Keys that are missing have no entry.
                let last = violation.path.rsplit('.').next().unwrap_or_default();
                let key = entry
                    .map(|entry| entry.from)
                    .or(CARRIED.iter().copied().find(|key| *key == last))
                    .unwrap_or_default();
                let lost = self.lost(key);
                let origin = entry.and_then(|entry| entry.origin.clone());
                let (file, line) = match (&lost, origin) {
                    (_, Some((file, line))) => (file, Some(line)),
                    (Some((file, setting, _)), None) => ((*file).to_owned(), Some(setting.line)),
                    (None, None) => (self.layers[0].file.to_owned(), None),
                };
                let (text, hint) = match lost {
                    Some((_, setting, why)) => (
                        format!("config.{key} = {} is not evaluated ({why})", setting.text),
                        WRITE_IT.to_owned(),
                    ),
                    None if key == "num_epoch" && line.is_none() => (
                        "config.num_epoch: is missing".to_owned(),
                        "the reference has no default either: config.num_epoch = 20".to_owned(),
                    ),
                    None if key.is_empty() => (violation.to_string(), violation.hint.clone()),
                    None => (
                        format!("config.{key}: {}", violation.problem),
                        violation.hint.clone(),
                    ),
                };
                Remark {
                    file,
                    line,
                    text,
                    hint,
                }
            })
            .collect()
    }

    /// The setting of a key that has no value in any layer, and why.
    fn lost(&self, key: &str) -> Option<(&str, &Setting, &str)> {
        let mut settings = self
            .layers
            .iter()
            .filter_map(|layer| Some((layer.file, layer.script.settings.get(key)?)));
        let (file, first) = settings.next()?;
        let why = first.value.as_ref().err()?;
        settings
            .all(|(_, setting)| setting.value.is_err())
            .then_some((file, first, why.as_str()))
    }

    /// The first layer's value of a key; settings without a value are noted and the next layer's taken.
    fn find(&mut self, place: (&str, &str), key: &str, default: Option<Value>) -> Found {
        let mut found = Found {
            value: None,
            origin: None,
            comments: Vec::new(),
        };
        let mut lost = Vec::new();
        for layer in self.layers {
            match layer.script.settings.get(key) {
                None => {}
                Some(Setting {
                    value: Err(why),
                    line,
                    text,
                }) => {
                    lost.push((layer.file, *line, text.to_owned(), why.clone()));
                }
                Some(setting) => {
                    found.value = setting.value.clone().ok();
                    found.origin = Some((layer.file.into(), setting.line));
                    break;
                }
            }
        }
        found.value = found.value.or(default);
        for (file, line, text, why) in lost {
            let instead = match &found.value {
                Some(value) => format!("{} has {value} instead", path(place.0, place.1)),
                None => format!("{} is left out", path(place.0, place.1)),
            };
            let message = format!("config.{key} = {text} is not evaluated ({why}): {instead}");
            self.remark(Some((file.into(), line)), message, WRITE_IT);
            found.comments.push(format!(
                "Line {line} of {} has {text}, which was not evaluated.",
                clean(file)
            ));
        }
        found
    }

    fn remark(&mut self, origin: Option<(String, usize)>, text: impl Into<String>, hint: &str) {
        let (file, line) = match origin {
            Some((file, line)) => (file, Some(line)),
            None => (self.layers[0].file.into(), None),
        };
        self.remarks.push(Remark {
            file,
            line,
            text: text.into(),
            hint: hint.into(),
        });
    }

    /// A line whose value is not the recipe's.
    fn literal(&mut self, section: &'static str, key: &'static str, value: String) {
        self.entries.push(Entry {
            section,
            key,
            value,
            comments: Vec::new(),
            from: "",
            origin: None,
        });
    }

    fn entry(
        &mut self,
        section: &'static str,
        key: &'static str,
        from: &'static str,
        value: String,
        found: Found,
    ) {
        self.entries.push(Entry {
            section,
            key,
            value,
            comments: found.comments,
            from,
            origin: found.origin,
        });
    }

    /// A key whose value is the same here. Without a value, the line is left out.
    fn plain(
        &mut self,
        section: &'static str,
        key: &'static str,
        from: &'static str,
        kind: Kind,
        default: Option<Value>,
    ) -> Option<Value> {
        let required = default.is_some();
        let found = self.find((section, key), from, default);
        let value = found.value.clone()?;
        if value == Value::Nothing && (!required || kind == Kind::Texts) {
            return None;
        }
        self.entry(section, key, from, toml(&value, kind), found);
        Some(value)
    }

    fn world_size(&mut self, options: &Options) -> u32 {
        let named = || {
            options.job.split(['_', '-', '.']).find_map(|part| {
                let count = part.strip_suffix("gpus").or(part.strip_suffix("gpu"))?;
                match count {
                    "one" => Some(1),
                    digits => digits.parse().ok().filter(|count| (1..=4096).contains(count)),
                }
            })
        };
        options.gpus.or_else(named).unwrap_or_else(|| {
            self.remark(
                None,
                "job.world_size has 8: a recipe does not say on how many GPUs it runs",
                "--gpus N sets it",
            );
            8
        })
    }

    fn output(&mut self, job: &str) {
        let mut found = self.find(("", "output"), "output", None);
        let value = match found.value.take() {
            None | Some(Value::Nothing) => text(&format!("work_dirs/{job}")),
            Some(value) => toml(&value, Kind::Text),
        };
        // The reference's base file names one folder for every recipe that names none.
        if self.layers.len() > 1
            && found
                .origin
                .as_ref()
                .is_some_and(|(file, _)| file == self.layers[1].file)
        {
            found.origin = None;
            return self.entry("", "output", "output", text(&format!("work_dirs/{job}")), found);
        }
        self.entry("", "output", "output", value, found);
    }

    fn margin(&mut self) {
        let arcface = || numbers(&[1.0, 0.5, 0.0]);
        // Older recipes name the loss; newer ones ignore the name.
        let set = self
            .layers
            .iter()
            .any(|layer| layer.script.settings.contains_key("margin_list"));
        let loss = self.layers.iter().find_map(|layer| {
            let setting = layer.script.settings.get("loss")?;
            Some((setting.value.clone(), (layer.file.to_owned(), setting.line)))
        });
        let default = match &loss {
            Some((Ok(Value::Text(name)), _)) if name == "cosface" => numbers(&[1.0, 0.0, 0.4]),
            _ => arcface(),
        };
        if let Some((value, origin)) = loss {
            let known = matches!(&value, Ok(Value::Text(name)) if name == "cosface" || name == "arcface");
            if set {
                self.remark(
                    Some(origin),
                    "config.loss is not carried over: config.margin_list decides",
                    "",
                );
            } else if !known {
                self.remark(
                    Some(origin),
                    "config.loss is not carried over: head.margin_list has [1.0, 0.5, 0.0], ArcFace",
                    "head.loss and head.margin_list choose the loss",
                );
            }
        }
        let mut found = self.find(("head", "margin_list"), "margin_list", Some(default));
        let value = found.value.clone().unwrap_or_else(arcface);
        let margins: Option<Vec<f64>> = match &value {
            Value::List(values) => values.iter().map(number).collect(),
            _ => None,
        };
        let value = match margins.as_deref() {
            Some([m1, m2, m3]) if *m3 > 0.0 && (*m1 != 1.0 || *m2 != 0.0) => {
                found.comments.push(format!(
                    "The recipe has {value}; the reference ignores m1 and m2 where m3 > 0."
                ));
                self.remark(
                    found.origin.clone(),
                    format!("config.margin_list: the reference ignores m1 and m2 of {value}; written as it trains, [1.0, 0.0, {m3:?}]"),
                    "all three are used here: write them into head.margin_list if you meant them",
                );
                numbers(&[1.0, 0.0, *m3])
            }
            Some([m1, _, m3]) if *m3 <= 0.0 && (*m1 != 1.0 || *m3 != 0.0) => {
                self.remark(
                    found.origin.clone(),
                    format!("config.margin_list: the reference refuses {value}; here it trains, as cos(m1*theta + m2) - m3"),
                    "",
                );
                value
            }
            _ => value,
        };
        self.entry(
            "head",
            "margin_list",
            "margin_list",
            toml(&value, Kind::Numbers),
            found,
        );
    }

    fn sample_rate(&mut self, classes: Option<Value>, world_size: u32) {
        let mut found = self.find(("head", "sample_rate"), "sample_rate", Some(Value::Real(1.0)));
        let mut value = found.value.clone().unwrap_or(Value::Real(1.0));
        if number(&value) == Some(0.0) {
            // Below one class a shard.
            let shard = classes.as_ref().and_then(number).unwrap_or(0.0) / f64::from(world_size);
            value = Value::Real(if shard < 1e6 { 1e-6 } else { 1e-12 });
            found.comments.extend([
                "The reference says 0: each step uses the classes of its batch and no random ones."
                    .to_owned(),
                "Any rate below one class a shard means the same.".to_owned(),
            ]);
            self.remark(
                found.origin.clone(),
                format!("config.sample_rate = 0: head.sample_rate has {value}, below one class a shard, which means the same"),
                "",
            );
        }
        self.entry(
            "head",
            "sample_rate",
            "sample_rate",
            toml(&value, Kind::Number),
            found,
        );
    }

    fn num_workers(&mut self) {
        let mut found = self.find(("data", "num_workers"), "num_workers", Some(Value::Whole(2)));
        let mut value = found.value.clone().unwrap_or(Value::Whole(2));
        if number(&value) == Some(0.0) {
            value = Value::Whole(1);
            found
                .comments
                .push("The recipe says 0: the training process decodes. Here a thread does.".into());
            self.remark(
                found.origin.clone(),
                "config.num_workers = 0: data.num_workers has 1, images are decoded by threads",
                "",
            );
        }
        self.entry(
            "data",
            "num_workers",
            "num_workers",
            toml(&value, Kind::Whole),
            found,
        );
    }

    fn augment(&mut self) {
        let dali = self.find(("data", "augment"), "dali", Some(Value::Bool(false)));
        if dali.value.is_some_and(|value| value.is_true()) {
            self.remark(
                dali.origin,
                "config.dali is not carried over: the same train.rec is read and decoded by data.num_workers threads a rank",
                "",
            );
        }
        let mut found = self.find(("data", "augment"), "dali_aug", Some(Value::Bool(false)));
        if found.value.take().is_some_and(|value| value.is_true()) {
            self.entry("data", "augment", "dali_aug", text("dali"), found);
        }
    }

    fn num_epoch(&mut self) {
        let found = self.find(("train", "num_epoch"), "num_epoch", None);
        // The reference has no default; the loader refuses the text.
        let value = match &found.value {
            Some(value) => toml(value, Kind::Whole),
            None => text("not set"),
        };
        self.entry("train", "num_epoch", "num_epoch", value, found);
    }

    fn warmup_epoch(&mut self) {
        let mut found = self.find(("train", "warmup_epoch"), "warmup_epoch", Some(Value::Whole(0)));
        let mut value = found.value.clone().unwrap_or(Value::Whole(0));
        if number(&value).is_some_and(|epochs| epochs < 0.0) {
            found.comments.push(format!(
                "The reference says {value}: no warm-up either, but its decay then ends a little above 0."
            ));
            self.remark(
                found.origin.clone(),
                format!("config.warmup_epoch = {value}: train.warmup_epoch has 0, no warm-up; the decay then ends at 0"),
                "",
            );
            value = Value::Whole(0);
        }
        self.entry(
            "train",
            "warmup_epoch",
            "warmup_epoch",
            toml(&value, Kind::Whole),
            found,
        );
    }

    fn gradient_acc(&mut self) {
        let found = self.find(("train", "gradient_acc"), "gradient_acc", Some(Value::Whole(1)));
        let value = found.value.clone().unwrap_or(Value::Whole(1));
        let accumulates = number(&value).is_some_and(|steps| steps > 1.0);
        self.entry(
            "train",
            "gradient_acc",
            "gradient_acc",
            toml(&value, Kind::Whole),
            found,
        );
        if accumulates {
            let found = Found {
                value: None,
                origin: None,
                comments: vec![
                    "The reference adds the gradients; without this line they are averaged.".into(),
                ],
            };
            self.entry("train", "accumulation", "gradient_acc", text("sum"), found);
        }
    }

    fn precision(&mut self) {
        let found = self.find(("train", "precision"), "fp16", Some(Value::Bool(false)));
        let value = match &found.value {
            Some(value) if value.is_true() => "fp16",
            _ => "fp32",
        };
        self.entry("train", "precision", "fp16", text(value), found);
    }

    /// Every key that has no place in a job file.
    fn rest(&mut self) {
        let using = self
            .layers
            .iter()
            .find_map(|layer| layer.script.settings.get("using_wandb"));
        let logs_to_wandb = using.is_some_and(|using| using.value.as_ref().is_ok_and(Value::is_true));
        let mut others: Vec<(String, usize, String, Option<Value>)> = Vec::new();
        for layer in self.layers {
            for (key, setting) in &layer.script.settings {
                let hidden = others.iter().any(|(_, _, known, _)| known == key);
                if !hidden && !CARRIED.contains(&key.as_str()) {
                    let value = setting.value.clone().ok();
                    others.push((layer.file.into(), setting.line, key.clone(), value));
                }
            }
        }
        for (file, line, key, value) in others {
            let asks_for_nothing = value.as_ref().is_some_and(|value| !value.is_true());
            let (why, hint) = match key.as_str() {
                // The first is dealt with beside the margins, the second chooses among the recipe's own branches.
                "loss" | "dataset" => continue,
                "resume" | "save_all_states" | "suffix_run_name" | "using_wandb" if asks_for_nothing => {
                    continue;
                }
                "resume" => (
                    "a job resumes from its own checkpoints without being told",
                    "model.init takes a backbone that `arcface-worker import` has read",
                ),
                "save_all_states" => (
                    "every checkpoint holds all states",
                    "[checkpoint] says how often and how many",
                ),
                "suffix_run_name" => ("it names a run of wandb", "job.name names the job"),
                "using_wandb" => (
                    "wandb is not here",
                    "metrics are in Prometheus' format at /metrics, evaluations in `arcface-coordinator evals`",
                ),
                key if key.starts_with("wandb_") || key == "save_artifacts" => match logs_to_wandb {
                    true => ("wandb is not here", ""),
                    false => continue,
                },
                "decay_epoch" | "lr_func" | "lr_steps" => (
                    "lr falls by the reference's polynomial of degree 2, not in steps",
                    "",
                ),
                _ => (
                    "it is not a key that the reference reads, or has no counterpart",
                    "",
                ),
            };
            self.remark(
                Some((file, line)),
                format!("config.{} is not carried over: {why}", clean(&key)),
                hint,
            );
        }
    }

    fn title(&mut self, world_size: u32, batch: Option<Value>) {
        let file = clean(self.layers[0].file);
        self.title = format!(
            "# Made of {file}, a recipe of arcface_torch, by `arcface-coordinator convert-config`.\n"
        );
        if let Some(Value::Whole(batch @ 1..=0xffff_ffff)) = batch {
            let total = group(batch * i64::from(world_size), ',');
            let ranks = if world_size == 1 { "rank" } else { "ranks" };
            let _ = writeln!(
                self.title,
                "# {world_size} {ranks} of {} samples, {total} together.",
                group(batch, ',')
            );
        }
        self.title.push('\n');
    }
}
