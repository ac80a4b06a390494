//! A verification set (`lfw.bin` and its like): a pickled pair of a list of encoded images and a list of flags,
//! two images a pair. Images may be bytes or bytearrays of any pickle protocol, Python 2 strings, or numpy arrays of bytes.

use super::EvalError;
use crate::data::pickle::{
    self, Allowed, BYTE_TYPES, CODECS_ENCODE, Limits, PickleError, Value, ValueId, Values, View,
};
use std::{
    borrow::Cow,
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

/// All that a verification set may name: bytes, numpy arrays of bytes, numpy booleans (numpy 1 and 2).
const ALLOWED: [Allowed; 11] = [
    CODECS_ENCODE,
    BYTE_TYPES[0],
    BYTE_TYPES[1],
    BYTE_TYPES[2],
    BYTE_TYPES[3],
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
];

/// A verification set in memory, images still encoded.
#[derive(Debug)]
pub struct VerificationSet {
    name: String,
    path: PathBuf,
    images: Images,
    issame: Vec<bool>,
}

#[derive(Debug, Default)]
struct Images {
    /// Distinct images: a pickle may name one object many times.
    encoded: Vec<Box<[u8]>>,
    /// Index into `encoded` by image.
    order: Vec<u32>,
}

impl VerificationSet {
    /// Reads the set at `path`; its name is the file's without the ending.
    pub fn open(path: &Path) -> Result<Self, EvalError> {
        let bytes = fs::read(path).map_err(|source| EvalError::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &bytes)
    }

    /// Reads the set from its bytes; `path` names it in errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, EvalError> {
        let broken = |source: PickleError| EvalError::Pickle {
            path: path.to_owned(),
            source,
        };
        let pickle = pickle::read(bytes, &ALLOWED, &Limits::default()).map_err(broken)?;
        Self::from_value(path, pickle.root(), bytes.len()).map_err(|detail| EvalError::Layout {
            path: path.to_owned(),
            detail,
        })
    }

    fn from_value(path: &Path, root: Value, budget: usize) -> Result<Self, String> {
        let parts = sequence(root).and_then(Values::exactly);
        let [images, flags] = parts.ok_or_else(|| {
            format!(
                "expected a pair (images, flags) of a verification set, found {}",
                root.kind()
            )
        })?;
        let issame = read_flags(flags)?;
        let list =
            sequence(images).ok_or_else(|| format!("expected a list of images, found {}", images.kind()))?;
        if issame.is_empty() || list.len() != 2 * issame.len() {
            return Err(format!(
                "{} images and {} flags: a verification set has two images a pair",
                list.len(),
                issame.len()
            ));
        }
        let images = read_images(list, budget)?;
        Ok(Self {
            name: path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            path: path.to_owned(),
            images,
            issame,
        })
    }

    /// The same under another name, where its path is a link to another one.
    pub fn named(self, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..self
        }
    }

    /// Name: `lfw` for `lfw.bin`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// File it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of pairs.
    pub fn pairs(&self) -> usize {
        self.issame.len()
    }

    /// By pair: true if both images show the same person.
    pub fn issame(&self) -> &[bool] {
        &self.issame
    }

    /// Number of images, two a pair.
    pub fn len(&self) -> usize {
        self.images.order.len()
    }

    /// False: a set without pairs is refused.
    pub fn is_empty(&self) -> bool {
        self.images.order.is_empty()
    }

    /// The encoded image at `index`; pair i has images 2i and 2i+1.
    pub fn encoded(&self, index: usize) -> Option<&[u8]> {
        let image = *self.images.order.get(index)?;
        self.images.encoded.get(image as usize).map(|bytes| &**bytes)
    }
}

fn sequence(value: Value<'_>) -> Option<Values<'_>> {
    match value.view() {
        View::List(values) | View::Tuple(values) => Some(values),
        _ => None,
    }
}

fn read_images(list: Values, budget: usize) -> Result<Images, String> {
    let mut known: HashMap<ValueId, u32> = HashMap::new();
    let mut images = Images::default();
    let mut total = 0usize;
    for (index, value) in list.iter().enumerate() {
        if let Some(&image) = known.get(&value.id()) {
            images.order.push(image);
            continue;
        }
        let bytes = value.bytes().or_else(|| array_bytes(value, &["u1", "i1"]));
        let bytes = bytes.ok_or_else(|| {
            format!(
                "image {}, counted from 1: expected bytes, found {}",
                index + 1,
                value.kind()
            )
        })?;
        // A small pickle can build the same long text into bytes again and again; an honest one does not.
        total = total.saturating_add(bytes.len());
        if total > budget {
            return Err(format!(
                "image {}, counted from 1: the images are larger than the file that holds them",
                index + 1
            ));
        }
        let image = images.encoded.len() as u32;
        images.encoded.push(bytes.into());
        known.insert(value.id(), image);
        images.order.push(image);
    }
    Ok(images)
}

fn read_flags(flags: Value) -> Result<Vec<bool>, String> {
    if let Some(bytes) = array_bytes(flags, &["b1", "u1"]) {
        return Ok(bytes.iter().map(|&byte| byte != 0).collect());
    }
    let list = sequence(flags).ok_or_else(|| format!("expected a list of flags, found {}", flags.kind()))?;
    let flag = |(index, value): (usize, Value)| {
        let flag = match value.view() {
            View::Bool(flag) => Some(flag),
            View::Int(number) => [false, true].get(usize::try_from(number).unwrap_or(2)).copied(),
            _ => scalar_bool(value),
        };
        flag.ok_or_else(|| {
            let (number, kind) = (index + 1, value.kind());
            format!("flag {number}, counted from 1: expected True or False, found {kind}")
        })
    };
    list.iter().enumerate().map(flag).collect()
}

fn is_numpy(module: &str) -> bool {
    matches!(module, "numpy.core.multiarray" | "numpy._core.multiarray")
}

/// The type code of a `numpy.dtype` object.
fn dtype(value: Value<'_>) -> Option<&str> {
    match value.view() {
        View::Object(object) if (object.module, object.name) == ("numpy", "dtype") => {
            object.args.get(0)?.text()
        }
        _ => None,
    }
}

/// Contents of a numpy array of one of the given one-byte types: its state is (version, shape, dtype, column-major,
/// contents).
fn array_bytes<'p>(value: Value<'p>, types: &[&str]) -> Option<Cow<'p, [u8]>> {
    let View::Object(object) = value.view() else {
        return None;
    };
    if !is_numpy(object.module) || object.name != "_reconstruct" {
        return None;
    }
    let [_version, shape, kind, _order, contents] = sequence(object.state?)?.exactly()?;
    if !types.contains(&dtype(kind)?) {
        return None;
    }
    let contents = contents.bytes()?;
    let size = sequence(shape)?.iter().try_fold(1usize, |size, n| {
        size.checked_mul(usize::try_from(n.int()?).ok()?)
    })?;
    (size == contents.len()).then_some(contents)
}

/// A numpy boolean: `scalar(dtype, contents)`.
fn scalar_bool(value: Value) -> Option<bool> {
    let View::Object(object) = value.view() else {
        return None;
    };
    if !is_numpy(object.module) || object.name != "scalar" {
        return None;
    }
    let [kind, contents] = object.args.exactly()?;
    match (dtype(kind)?, &*contents.bytes()?) {
        ("b1", [byte]) => Some(*byte != 0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<VerificationSet, String> {
        VerificationSet::parse(Path::new("some/set.bin"), bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn pairs_of_images_and_flags() {
        let set = parse(b"\x80\x02](U\x01aU\x01bU\x01cq\x01h\x01e](\x88\x89e\x86.").expect("valid");
        assert_eq!((set.name(), set.pairs(), set.len()), ("set", 2, 4));
        assert_eq!(set.issame(), [true, false]);
        assert_eq!(
            (set.encoded(0), set.encoded(3), set.encoded(4)),
            (Some(&b"a"[..]), Some(&b"c"[..]), None)
        );
    }

    #[test]
    fn numpy_arrays_and_booleans() {
        let dtype = b"cnumpy\ndtype\nU\x02b1K\x00K\x01\x87R";
        let array = |contents: &[u8]| {
            let mut out = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89U".to_vec();
            out.push(contents.len() as u8);
            out.extend(contents);
            out.extend(b"tb");
            out
        };
        let file = |contents: &[u8]| {
            let mut out = b"\x80\x02](".to_vec();
            out.extend(array(contents));
            out.extend(array(b"yz"));
            out.extend(b"e]cnumpy.core.multiarray\nscalar\n");
            out.extend(dtype);
            out.extend(b"U\x01\x01\x86Ra\x86.");
            out
        };
        let set = parse(&file(b"wx")).expect("valid");
        assert_eq!(
            (set.encoded(0), set.encoded(1)),
            (Some(&b"wx"[..]), Some(&b"yz"[..]))
        );
        assert_eq!(set.issame(), [true]);
        // A shape that does not fit the contents.
        assert!(
            parse(&file(b"wxy"))
                .expect_err("shape")
                .contains("image 1, counted from 1: expected bytes")
        );
    }

    /// pickle.dumps(([b"a\xff", bytearray(b"b\xff")], [True]), protocol=2) of Python 3, and what Python 2 and protocol 3 make of it.
    #[test]
    fn bytes_and_bytearrays_of_every_python_are_images() {
        let text = |bytes: &[u8]| {
            let text: String = bytes.iter().map(|&byte| char::from(byte)).collect();
            let mut out = vec![b'X'];
            out.extend((text.len() as u32).to_le_bytes());
            out.extend(text.as_bytes());
            out
        };
        let call = |global: &str, args: &[Vec<u8>]| {
            let (module, name) = global.split_once('.').expect("a global");
            let global = format!("c{module}\n{name}\n").into_bytes();
            [global, vec![b'('], args.concat(), b"tR".to_vec()].concat()
        };
        let file = |images: [Vec<u8>; 2]| {
            let [first, second] = images;
            [b"\x80\x02](".to_vec(), first, second, b"e]\x88a\x86.".to_vec()].concat()
        };
        let latin1 = |bytes: &[u8], codec: &[u8]| [text(bytes), text(codec)];
        for array in [
            call("__builtin__.bytearray", &latin1(b"b\xff", b"latin-1")),
            call("builtins.bytearray", &latin1(b"b\xff", b"latin-1")),
            call("builtins.bytearray", &[b"C\x02b\xff".to_vec()]),
        ] {
            let set = parse(&file([
                call("_codecs.encode", &latin1(b"a\xff", b"latin1")),
                array,
            ]))
            .expect("valid");
            assert_eq!(
                (set.encoded(0), set.encoded(1)),
                (Some(&b"a\xff"[..]), Some(&b"b\xff"[..]))
            );
        }
        // Empty bytes, which are then refused as an image, by their number.
        let set = parse(&file([
            call("__builtin__.bytes", &[]),
            call("builtins.bytearray", &[]),
        ]));
        assert_eq!(set.expect("valid").encoded(1), Some(&b""[..]));
        for other in [
            call("__builtin__.bytes", &[b"K\x09".to_vec()]),
            call("__builtin__.bytearray", &[b"J\xff\xff\xff\x7f".to_vec()]),
            call("__builtin__.bytearray", &latin1(b"b", b"rot13")),
            call("_codecs.encode", &[]),
        ] {
            let error = parse(&file([other, b"U\x01a".to_vec()])).expect_err("refused");
            assert!(
                error.contains("image 1, counted from 1: expected bytes"),
                "{error}"
            );
        }
        for foreign in ["__builtin__.eval", "builtins.list", "_codecs.decode"] {
            let error = parse(&file([call(foreign, &[]), b"U\x01a".to_vec()])).expect_err("refused");
            assert!(error.contains(&format!("foreign global {foreign}")), "{error}");
        }
    }

    #[test]
    fn other_files_are_refused_with_the_reason() {
        for (bytes, expected) in [
            (&b"not a pickle"[..], "some/set.bin: pickle"),
            (
                b"K\x01.",
                "expected a pair (images, flags) of a verification set, found an integer",
            ),
            (b"](U\x01ae]\x88a\x86.", "1 images and 1 flags"),
            (b"]]\x86.", "0 images and 0 flags"),
            (
                b"](U\x01aNe]\x88a\x86.",
                "image 2, counted from 1: expected bytes, found None",
            ),
            (
                b"](U\x01aU\x01be]K\x02a\x86.",
                "flag 1, counted from 1: expected True or False",
            ),
            (b"cos\nsystem\n.", "foreign global os.system"),
        ] {
            let error = parse(bytes).expect_err("refused");
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn text_turned_into_bytes_many_times_is_refused() {
        let mut bytes = b"c_codecs\nencode\nq\x00X\x40\x00\x00\x00".to_vec();
        bytes.extend([b'x'; 64]);
        bytes.extend(b"q\x01X\x06\x00\x00\x00latin1q\x02](");
        for _ in 0..40 {
            bytes.extend(b"h\x00h\x01h\x02\x86R");
        }
        bytes.extend(b"e](");
        bytes.extend([0x88; 20]);
        bytes.extend(b"e\x86.");
        assert!(parse(&bytes).expect_err("bomb").contains("larger than the file"));
    }
}
