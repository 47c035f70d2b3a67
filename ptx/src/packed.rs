//! How the files are kept: PTX repeats itself from instance to instance, and shrinks to a fourteenth.
//!
//! The format is lzip, a header and a checksum around one LZMA stream: `xz -dc` (5.4) and `lzip -dc` read it as well.

use std::io::{self, Read as _};

/// The text of a packed file.
///
/// # Errors
/// What the decoder says of bytes that are cut off, or whose checksum is another one; text that is not UTF-8.
pub fn unpack(packed: &[u8]) -> io::Result<String> {
    let mut text = String::new();
    lzma_rust2::LzipReader::new(packed).read_to_string(&mut text)?;
    // Without a single member the reader finds nothing wrong.
    if text.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(text) }
}

/// Packs a text as small as the format allows, in seconds. The same text gives the same bytes.
///
/// # Errors
/// What the encoder says; it writes to memory alone.
#[cfg(feature = "regenerate")]
pub fn pack(text: &str) -> io::Result<Vec<u8>> {
    use std::io::Write as _;

    let mut options = lzma_rust2::LzipOptions::with_preset(9);
    options.lzma_options.dict_size = 16 << 20; // more than a whole text
    options.lzma_options.nice_len = 273; // the most
    options.lzma_options.depth_limit = 1000;
    let mut writer = lzma_rust2::LzipWriter::new(Vec::new(), options);
    writer.write_all(text.as_bytes())?;
    writer.finish()
}

#[cfg(all(test, feature = "regenerate"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_back() {
        let text = "mma.sync {%r1, %r2}, {%r3};\n".repeat(1000);
        let packed = pack(&text).expect("packed");
        assert!(packed.len() < 200, "{}", packed.len());
        assert_eq!(packed, pack(&text).expect("packed again"));
        assert_eq!(unpack(&packed).expect("unpacked"), text);
    }

    #[test]
    fn damage_is_noticed_or_does_no_harm() {
        let text = "mma.sync {%r1, %r2}, {%r3};\n";
        let packed = pack(text).expect("packed");
        for length in 0..packed.len() {
            assert!(unpack(&packed[..length]).is_err(), "the first {length} bytes alone");
        }
        for at in 0..packed.len() {
            let mut damaged = packed.clone();
            damaged[at] ^= 1;
            // The last bytes of the stream carry nothing.
            assert!(unpack(&damaged).map_or(true, |unpacked| unpacked == text), "byte {at}");
        }
    }
}
