//! What `torch.save` wrote before 1.6, and still does with `_use_new_zipfile_serialization=False`: pickles of a magic
//! number, a version, the machine's byte order, the object and the keys of its storages, then each storage as a count
//! of its elements and their values.
//!
//! Knows no tensor.

use std::collections::HashMap;

use super::state_dict::{Kinds, MAX_PICKLE, allowed_globals, limits};
use crate::data::pickle::{self, Pickle, View};

/// How such a file begins: the pickle of its magic number.
pub(crate) const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
/// The only version there has been.
const VERSION: i64 = 1001;

/// The object, and the bytes of its storages by key.
pub(super) fn read(file: &[u8]) -> Result<(Pickle<'_>, HashMap<String, &[u8]>), String> {
    let mut rest = file
        .strip_prefix(MAGIC)
        .ok_or("not a file that torch.save wrote before 1.6")?;
    let version = next(&mut rest, file, "the version")?;
    match version.root().int() {
        Some(VERSION) => {}
        found => return Err(format!("version {found:?} of the format, expected {VERSION}")),
    }
    let system = next(&mut rest, file, "the system's properties")?;
    if let View::Dict(properties) = system.root().view()
        && properties.pairs().any(|(name, value)| {
            name.text() == Some("little_endian") && matches!(value.view(), View::Bool(false))
        })
    {
        return Err("values are big-endian, which is not supported".to_owned());
    }
    let object = next(&mut rest, file, "the object")?;
    let keys = next(&mut rest, file, "the storages' keys")?;
    let View::List(keys) = keys.root().view() else {
        return Err(format!("the storages' keys are {}", keys.root().kind()));
    };
    // How wide a storage's elements are is said by the tensors that view it.
    let mut kinds = Kinds::default();
    kinds.collect(&object)?;
    let mut storages = HashMap::new();
    for key in keys.iter() {
        let key = key.text().ok_or("a storage's key is no text")?;
        let width = kinds
            .width(key)
            .ok_or_else(|| format!("storage {key:?} belongs to no tensor"))?;
        let at = file.len() - rest.len();
        let fail = |what: String| format!("storage {key:?} at byte {at}: {what}");
        let (count, values) = rest
            .split_first_chunk::<8>()
            .ok_or_else(|| fail("the file is cut off".to_owned()))?;
        let count = i64::from_le_bytes(*count);
        let bytes = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(width));
        let Some((bytes, after)) = bytes.and_then(|bytes| values.split_at_checked(bytes)) else {
            return Err(fail(format!(
                "{count} elements of {width} bytes, but the file has {} bytes left",
                values.len()
            )));
        };
        rest = after;
        if storages.insert(key.to_owned(), bytes).is_some() {
            return Err(fail("its key comes twice".to_owned()));
        }
    }
    match rest.len() {
        0 => Ok((object, storages)),
        left => Err(format!("{left} bytes follow the last storage")),
    }
}

/// The pickle at the start of `rest`, which is moved behind it.
fn next<'a>(rest: &mut &'a [u8], file: &[u8], what: &str) -> Result<Pickle<'a>, String> {
    let at = file.len() - rest.len();
    let bounded = rest.get(..MAX_PICKLE).unwrap_or(rest);
    let pickle = pickle::read(bounded, &allowed_globals(), &limits())
        .map_err(|error| format!("{what}, from byte {at}: {error}"))?;
    *rest = &rest[pickle.consumed()..];
    Ok(pickle)
}
