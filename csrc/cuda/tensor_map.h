// Tensor maps: what Hopper's copy engine (the Tensor Memory Accelerator) is told of a tensor once, so that a single
// thread's instruction copies a box of it.
#pragma once

#include <cuda.h>

#include "attention_arguments.h"

namespace pytransformer::cuda {

// A map of [B,H,T,width] for boxes of 64 columns and some rows of a head, or none, where no map can tell of the tensor
// or no head has a box of rows. Columns beyond the width are zeros.
struct TileMap {
  CUtensorMap map;
  bool there = false;
};

// Of what a map tells. `rows` are those of a head, or of the longest sequence where sequences lie end to end: then
// nobody has counted all, and none may be asked for that is not there.
struct MapSize {
  int batches, heads, rows;
  bool end_to_end;
};

TileMap tile_map(const char* name, const Heads& heads, MapSize size, int tile_rows);

}  // namespace pytransformer::cuda
