"""Programs run by hand: reference pages, example graphs, pretraining of the embedded model."""
