// A page opened from disk may not read its neighbours, which search summaries need.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
