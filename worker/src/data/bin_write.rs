//! Writes verification sets (`lfw.bin` and its like): a pickle of (list of encoded images, list of flags), two images a
//! pair. Protocol 3, which Python 3 reads in any version and which needs no import.

/// Bytes of a verification set; pair i is images 2i and 2i+1. `None` if the numbers do not fit or an image is longer than
/// 4 GiB.
pub fn verification_set(images: &[impl AsRef<[u8]>], issame: &[bool]) -> Option<Vec<u8>> {
    if images.len() != issame.len().checked_mul(2)? {
        return None;
    }
    let mut out = Vec::with_capacity(
        images.iter().map(|image| image.as_ref().len() + 5).sum::<usize>() + issame.len() + 16,
    );
    // PROTO 3, EMPTY_LIST, MARK
    out.extend(b"\x80\x03](");
    for image in images {
        let image = image.as_ref();
        // BINBYTES
        out.push(b'B');
        out.extend(u32::try_from(image.len()).ok()?.to_le_bytes());
        out.extend(image);
    }
    // APPENDS, EMPTY_LIST, MARK
    out.extend(b"e](");
    // NEWTRUE, NEWFALSE
    out.extend(issame.iter().map(|&same| if same { 0x88 } else { 0x89 }));
    // APPENDS, TUPLE2, STOP
    out.extend(b"e\x86.");
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::super::pickle::{self, Limits, View};
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let images: Vec<Vec<u8>> = (0..6u8).map(|i| vec![i; 300 * usize::from(i)]).collect();
        let bytes = verification_set(&images, &[true, false, true]).unwrap();
        let read = pickle::read(&bytes, &[], &Limits::default()).unwrap();
        let View::Tuple(parts) = read.root().view() else {
            panic!("not a tuple");
        };
        let [list, flags] = parts.exactly().unwrap();
        let (View::List(list), View::List(flags)) = (list.view(), flags.view()) else {
            panic!("not lists");
        };
        let found: Vec<Vec<u8>> = list.iter().map(|value| value.bytes().unwrap().to_vec()).collect();
        assert_eq!(found, images);
        let flags: Vec<bool> = flags
            .iter()
            .map(|value| matches!(value.view(), View::Bool(true)))
            .collect();
        assert_eq!(flags, [true, false, true]);
        assert_eq!(verification_set(&images, &[true]), None);
    }
}
