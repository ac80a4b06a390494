//! Finds and reads the golden data: values computed by the reference implementation. Shared by every golden test;
//! it knows file formats, not what the files mean.
//!
//! The folder is `$ARCFACE_GOLDEN`, by default `../shared/golden` beside the checkout. Tests are driven by the data:
//! each runs every file of its kind and calls [`report`], which fails when there was none, unless
//! `ARCFACE_GOLDEN_PARTIAL=1` says that the folder holds only some kinds.

// Every test binary compiles its own copy and uses its own part of it.
#![allow(dead_code)]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};
use tch::{Kind, Tensor};

/// The golden folder.
pub fn root() -> PathBuf {
    match std::env::var_os("ARCFACE_GOLDEN") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden"),
    }
}

/// True if the folder may lack whole kinds of files.
pub fn partial() -> bool {
    std::env::var("ARCFACE_GOLDEN_PARTIAL").is_ok_and(|value| value == "1")
}

/// Every file `folder/prefix*suffix`, sorted; an absent folder has none.
pub fn golden_files(folder: &str, prefix: &str, suffix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root().join(folder)) else {
        return Vec::new();
    };
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("list the golden folder").path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
            name.len() >= prefix.len() + suffix.len() && name.starts_with(prefix) && name.ends_with(suffix)
        })
        .collect();
    files.sort();
    files
}

/// Says how many cases of a kind ran, and fails if none did.
///
/// # Panics
/// If `count` is 0 and the folder is not partial.
pub fn report(kind: &str, count: usize) {
    println!("golden {kind}: {count} ran, from {}", root().display());
    assert!(
        count > 0 || partial(),
        "golden {kind}: no file under {}; ARCFACE_GOLDEN names the folder, ARCFACE_GOLDEN_PARTIAL=1 allows gaps",
        root().display()
    );
}

/// A safetensors file, read whole.
pub struct GoldenFile {
    /// Where it came from.
    pub path: PathBuf,
    /// `__metadata__` of the header.
    pub metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

impl GoldenFile {
    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor, if the file has it.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).map(Tensor::shallow_clone)
    }

    /// A tensor that the file must have.
    pub fn tensor(&self, name: &str) -> Tensor {
        self.get(name)
            .unwrap_or_else(|| panic!("{}: no tensor {name}", self.path.display()))
    }

    /// The values of a tensor of any kind, as f64 in row-major order.
    pub fn values(&self, name: &str) -> Vec<f64> {
        values(&self.tensor(name))
    }

    /// The only value of a tensor.
    pub fn scalar(&self, name: &str) -> f64 {
        let values = self.values(name);
        assert_eq!(values.len(), 1, "{}: {name} is no scalar", self.path.display());
        values[0]
    }

    /// A metadata entry parsed as JSON (numbers and lists are written so).
    pub fn meta(&self, key: &str) -> serde_json::Value {
        let text = self
            .metadata
            .get(key)
            .unwrap_or_else(|| panic!("{}: no metadata {key}", self.path.display()));
        serde_json::from_str(text)
            .unwrap_or_else(|error| panic!("{}: metadata {key} {text:?}: {error}", self.path.display()))
    }
}

/// Reads a safetensors file of f32, f64, i64, i32 or u8/bool tensors.
///
/// # Panics
/// With the file's name, if it cannot be read.
pub fn read_safetensors(path: &Path) -> GoldenFile {
    let fail = |what: String| -> ! { panic!("{}: {what}", path.display()) };
    let bytes = fs::read(path).unwrap_or_else(|error| fail(error.to_string()));
    let (_, header) =
        safetensors::SafeTensors::read_metadata(&bytes).unwrap_or_else(|error| fail(error.to_string()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|error| fail(error.to_string()));
    let tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let kind = match view.dtype() {
                safetensors::Dtype::F32 => Kind::Float,
                safetensors::Dtype::F64 => Kind::Double,
                safetensors::Dtype::I64 => Kind::Int64,
                safetensors::Dtype::I32 => Kind::Int,
                safetensors::Dtype::U8 => Kind::Uint8,
                safetensors::Dtype::BOOL => Kind::Bool,
                other => fail(format!("{name}: kind {other:?} is not expected here")),
            };
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            let tensor = Tensor::from_data_size(view.data(), &shape, kind);
            (name, tensor)
        })
        .collect();
    GoldenFile {
        path: path.to_owned(),
        metadata: header.metadata().clone().unwrap_or_default(),
        tensors,
    }
}

/// Reads a JSON file.
///
/// # Panics
/// With the file's name, if it cannot be read.
pub fn read_json(path: &Path) -> serde_json::Value {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The values of a tensor of any kind and shape, as f64 in row-major order.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).contiguous().view([-1])).expect("a CPU tensor")
}

/// `|a - b| / max(|b|, tiny)` in the L2 norm, computed in f64; NaN counts as infinitely far.
pub fn relative_l2(ours: &Tensor, golden: &Tensor) -> f64 {
    assert_eq!(ours.size(), golden.size(), "shapes differ");
    let (ours, golden) = (ours.to_kind(Kind::Double), golden.to_kind(Kind::Double));
    let difference = (&ours - &golden).norm().double_value(&[]);
    let distance = difference / golden.norm().double_value(&[]).max(1e-300);
    if distance.is_nan() {
        f64::INFINITY
    } else {
        distance
    }
}

/// Largest `|a - b|`, computed in f64; NaN counts as infinitely far, nothing as 0.
pub fn max_abs_difference(ours: &Tensor, golden: &Tensor) -> f64 {
    assert_eq!(ours.size(), golden.size(), "shapes differ");
    if golden.numel() == 0 {
        return 0.0;
    }
    let (ours, golden) = (ours.to_kind(Kind::Double), golden.to_kind(Kind::Double));
    let distance = (&ours - &golden).abs().max().double_value(&[]);
    if distance.is_nan() {
        f64::INFINITY
    } else {
        distance
    }
}
