//! Reads server-sent events from bytes that may be split anywhere.

/// The longest event that is taken in. A provider that sends more is broken.
const MOST: usize = 8 * 1024 * 1024;

/// An event is longer than 8 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than 8 MiB")]
pub(super) struct TooLong;

/// Collects bytes until they make an event. Only `data` matters: neither OpenAI's nor Anthropic's
/// stream says anything in its other fields that its data does not say too.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    bytes: Vec<u8>,
    /// How far `bytes` has been searched for the end of a line.
    searched: usize,
    /// Where the next line begins.
    start: usize,
    data: Option<String>,
}

impl Decoder {
    /// Takes more bytes in.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.searched -= self.start;
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
        let held = self.bytes.len() + self.data.as_ref().map_or(0, String::len);
        // Pieces already complete are taken out before the next push, so what is held is one event.
        if held > MOST + bytes.len() {
            Err(TooLong)
        } else {
            Ok(())
        }
    }

    /// The data of the next complete event.
    pub(super) fn next(&mut self) -> Option<String> {
        while let Some(end) = self.bytes[self.searched..]
            .iter()
            .position(|byte| *byte == b'\n')
        {
            let end = self.searched + end;
            let line = &self.bytes[self.start..end];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            self.start = end + 1;
            self.searched = self.start;
            if line.is_empty() {
                if let Some(data) = self.data.take() {
                    return Some(data);
                }
            } else if let Some(value) = line.strip_prefix(b"data:") {
                let value = String::from_utf8_lossy(value.strip_prefix(b" ").unwrap_or(value));
                match &mut self.data {
                    None => self.data = Some(value.into_owned()),
                    Some(data) => {
                        data.push('\n');
                        data.push_str(&value);
                    }
                }
            }
        }
        self.searched = self.bytes.len();
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(pieces: &[&[u8]]) -> Vec<String> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        for piece in pieces {
            decoder.push(piece).unwrap();
            events.extend(std::iter::from_fn(|| decoder.next()));
        }
        events
    }

    const STREAM: &str = ": comment\r\nevent: a\r\ndata: {\"a\":\"é\"}\r\n\r\ndata:one\ndata: two\nid: 7\n\n\n\ndata: [DONE]\n\ndata: cut";

    #[test]
    fn comments_crlf_and_several_data_lines_are_read() {
        assert_eq!(
            decode(&[STREAM.as_bytes()]),
            ["{\"a\":\"é\"}", "one\ntwo", "[DONE]"]
        );
    }

    #[test]
    fn a_stream_split_at_every_byte_reads_the_same() {
        let pieces: Vec<&[u8]> = STREAM.as_bytes().chunks(1).collect();
        assert_eq!(decode(&pieces), decode(&[STREAM.as_bytes()]));
    }

    #[test]
    fn a_long_event_is_read_and_an_endless_one_refused() {
        let long = format!("data: {}\n\n", "x".repeat(1024 * 1024));
        assert_eq!(decode(&[long.as_bytes()])[0].len(), 1024 * 1024);
        let mut decoder = Decoder::default();
        let refused = (0..20)
            .map(|_| decoder.push(&[b'x'; 1024 * 1024]))
            .find(Result::is_err);
        assert_eq!(refused, Some(Err(TooLong)));
    }

    proptest! {
        #[test]
        fn any_split_reads_the_same(cuts in proptest::collection::vec(0..STREAM.len(), 0..12)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &STREAM.as_bytes()[pair[0]..pair[1]]).collect();
            prop_assert_eq!(decode(&pieces), decode(&[STREAM.as_bytes()]));
        }
    }
}
