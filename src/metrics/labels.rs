//! The values that labels may have. All of them are known before anything happens, so their series start at 0.

/// A label whose values are known.
pub(super) trait Label: Copy + 'static {
    /// All values, in the order of their numbers.
    const ALL: &'static [Self];

    /// The value as a scraper sees it.
    fn value(self) -> &'static str;

    /// Its place in [`Label::ALL`].
    fn number(self) -> usize;
}

macro_rules! label {
    ($(#[$doc:meta])* $vis:vis $name:ident { $($variant:ident = $value:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        $vis enum $name {
            $(#[doc = concat!("`", $value, "`")] $variant,)*
        }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            fn value(self) -> &'static str {
                match self {
                    $(Self::$variant => $value,)*
                }
            }

            fn number(self) -> usize {
                self as usize
            }
        }
    };
}

label! {
    /// The level of a line of the log.
    pub(super) Severity {
        Error = "error",
        Warn = "warn",
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}
