//! The line protocol of the demo service.
//!
//! A request is one line of UTF-8, ended by `\n`, at most [`MAX_LINE`] bytes. `n` is the client's own number for the
//! request (decimal, 64 bits) and comes back in the reply, so that a client sees a lost, repeated or misplaced reply.
//!
//! | request | reply |
//! | --- | --- |
//! | `PUT n key value` | `OK n total_writes`, once the write is on the disk |
//! | `GET n key` | `VAL n value` or `NIL n` |
//! | `PING n` | `PONG n` |
//! | `COUNT n` | `COUNT n total_writes keys` |
//! | `DUMP n` | `KEY n key value` for each key, in order, then `END n keys` |
//! | anything else | `ERR n reason`, with n = 0 if the line has no number |
//!
//! A key is 1 to [`MAX_KEY`] bytes without spaces. A value is the rest of the line; it may contain spaces.

/// Longest request in bytes, without the line end.
pub const MAX_LINE: usize = 8192;

/// Longest key in bytes.
pub const MAX_KEY: usize = 256;

/// What is wrong with a request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("the line is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("the line is not UTF-8 or contains a control character")]
    NotText,
    #[error("the request has no number")]
    NoNumber,
    #[error("unknown command")]
    UnknownCommand(u64),
    #[error("the request has too few or too many words")]
    WrongWords(u64),
    #[error("the key is longer than {MAX_KEY} bytes")]
    KeyTooLong(u64),
}

impl RequestError {
    /// Number of the request, 0 if it is not known.
    pub fn number(&self) -> u64 {
        match self {
            RequestError::TooLong | RequestError::NotText | RequestError::NoNumber => 0,
            RequestError::UnknownCommand(n) | RequestError::WrongWords(n) | RequestError::KeyTooLong(n) => *n,
        }
    }
}

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The client's number for it.
    pub number: u64,
    /// What to do.
    pub command: Command<'a>,
}

/// What a client can ask for.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Command<'a> {
    Put { key: &'a str, value: &'a str },
    Get { key: &'a str },
    Ping,
    Count,
    Dump,
}

impl<'a> Request<'a> {
    /// Parses a line without its end.
    pub fn parse(line: &'a [u8]) -> Result<Request<'a>, RequestError> {
        if line.len() > MAX_LINE {
            return Err(RequestError::TooLong);
        }
        let line = str::from_utf8(line).map_err(|_| RequestError::NotText)?;
        if line.chars().any(char::is_control) {
            return Err(RequestError::NotText);
        }
        let mut words = line.splitn(4, ' ');
        let name = words.next().unwrap_or_default();
        let number = words.next().and_then(|word| word.parse().ok()).ok_or(RequestError::NoNumber)?;
        let command = match (name, words.next(), words.next()) {
            ("PUT", Some(key), Some(value)) if !key.is_empty() => Command::Put { key, value },
            ("GET", Some(key), None) if !key.is_empty() => Command::Get { key },
            ("PING", None, None) => Command::Ping,
            ("COUNT", None, None) => Command::Count,
            ("DUMP", None, None) => Command::Dump,
            ("PUT" | "GET" | "PING" | "COUNT" | "DUMP", _, _) => {
                return Err(RequestError::WrongWords(number));
            }
            _ => return Err(RequestError::UnknownCommand(number)),
        };
        match command {
            Command::Put { key, .. } | Command::Get { key } if key.len() > MAX_KEY => {
                Err(RequestError::KeyTooLong(number))
            }
            _ => Ok(Request { number, command }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_the_rest_of_the_line() {
        let request = Request::parse(b"PUT 18446744073709551615 k  a  b ").unwrap();
        assert_eq!(request.number, u64::MAX);
        assert_eq!(request.command, Command::Put { key: "k", value: " a  b " });
    }

    #[test]
    fn each_mistake_has_its_error() {
        let key = "k".repeat(MAX_KEY + 1);
        let long = vec![b'x'; MAX_LINE + 1];
        let cases: [(&[u8], RequestError); 10] = [
            (b"", RequestError::NoNumber),
            (b"PUT k v", RequestError::NoNumber),
            (b"PING 18446744073709551616", RequestError::NoNumber),
            (b"ping 1", RequestError::UnknownCommand(1)),
            (b"PUT 1 k", RequestError::WrongWords(1)),
            (b"GET 2 ", RequestError::WrongWords(2)),
            (b"PING 3 x", RequestError::WrongWords(3)),
            (b"PING 4\r", RequestError::NotText),
            (b"\xff", RequestError::NotText),
            (&long, RequestError::TooLong),
        ];
        for (line, error) in cases {
            assert_eq!(Request::parse(line), Err(error), "{}", String::from_utf8_lossy(line));
        }
        assert_eq!(Request::parse(format!("GET 5 {key}").as_bytes()), Err(RequestError::KeyTooLong(5)));
    }
}
