// Latent attention of whole tiles of heads by tiles: rows of the cache are the first factor of the logits as they
// lie, heads' queries the second; of the weighted sums heads' weights are the first, and values, in pairs of tokens,
// the second. Weights are rounded to bfloat16.
#pragma once

#include "softmax.hpp"
#include "tiles.hpp"

namespace {

// Logits of all heads for a tile's tokens.
inline void multiply_keys(
    Tiles& tiles, const Heads& shape, const TokenTile& tile, const Bf16* rows, const Bf16* queries,
    const RowsAhead& ahead) {
    const int64_t dim = shape.token_elements;
    TileRows keys[] = {{rows, dim, false, ahead, {tile.scores, shape.heads, TILE * shape.heads, TILE}}};
    TileTokens heads = {queries, native::arranged_elements(TILE, dim), shape.heads / TILE};
    for (int64_t start = 0; start < dim; start += TILE_STRETCH) {
        const int64_t length = dim - start < TILE_STRETCH ? dim - start : TILE_STRETCH;
        keys[0].first = rows + start;
        multiply_stretch(tiles, keys, tile.tokens, length, heads, start == 0);
        heads.first += length / TILE_COLUMNS * TILE_ELEMENTS;
    }
}

// Weights, [token][head], as rows of heads: nought where there are no more of `tokens`.
inline void turn_weights(const Heads& shape, const TokenTile& tile, int64_t tokens, Bf16* weights) {
    std::memset(tile.scores + tile.tokens * shape.heads, 0, (tokens - tile.tokens) * shape.heads * sizeof(float));
    for (int64_t head = 0; head < shape.heads; head += TILE) {
        for (int64_t t = 0; t < tokens; t += TILE) {
            const void* from[TILE];
            for (int i = 0; i < TILE; ++i) from[i] = tile.scores + (t + i) * shape.heads + head;
            float turned[TILE][TILE];
            transpose(from, turned[0], TILE);
            for (int h = 0; h < TILE; ++h) {
                Bf16* const row = weights + (head + h) * shape.tile_tokens + t;
                for (int i = 0; i < TILE; i += LANES) store_as(row + i, widen(turned[h] + i));
            }
        }
    }
}

// TILE_COLUMNS columns of the rows of a cache, of which `there` are theirs, as two tiles for each TILE_COLUMNS tokens:
// of each two tokens both elements of a column, and columns in the order of their sums.
inline void pair_values(const Bf16* rows, int64_t apart, int64_t tokens, int64_t there, int64_t tile_apart, Bf16* to) {
    constexpr int WORDS = TILE_COLUMNS / 2;
    const auto take = [&](int64_t token, uint32_t (&words)[WORDS]) {
        if (token < tokens && there == TILE_COLUMNS) {
            std::memcpy(words, rows + token * apart, sizeof words);
        } else {
            std::memset(words, 0, sizeof words);
            if (token < tokens) std::memcpy(words, rows + token * apart, there * sizeof(Bf16));
        }
    };
    for (int64_t token = 0; token < native::rounded_up(tokens, TILE_COLUMNS); token += 2, to += TILE_COLUMNS) {
        uint32_t first[WORDS], second[WORDS], pairs[2 * WORDS];
        take(token, first);
        take(token + 1, second);
        for (int w = 0; w < WORDS; ++w) {  // even columns of LANES words, then odd ones, as `Pack` has them
            const int place = w / LANES * 2 * LANES + w % LANES;
            pairs[place] = (first[w] & 0xffffu) | (second[w] << 16);
            pairs[place + LANES] = (first[w] >> 16) | (second[w] & 0xffff0000u);
        }
        std::memcpy(to, pairs, sizeof pairs / 2);
        std::memcpy(to + tile_apart, pairs + WORDS, sizeof pairs / 2);
    }
}

// Add a tile's weighted values of all heads. What comes next is fetched meanwhile, `num_bytes` from `next` on.
inline void multiply_values(
    Tiles& tiles, const Heads& shape, const TokenTile& tile, const Bf16* rows, float* summed, Bf16* weights,
    const char* next, int64_t num_bytes) {
    const int64_t tokens = native::rounded_up(tile.tokens, TILE_COLUMNS), padded = shape.padded_dim;
    turn_weights(shape, tile, tokens, weights);
    for (int64_t h = 0; h < shape.heads; ++h) {
        if (tile.factors[h] == 1.0f) continue;
        const Floats factor = splat(tile.factors[h]);
        float* const sums = summed + h * padded;
        for (int64_t i = 0; i < padded; i += LANES) store(sums + i, multiply(widen(sums + i), factor));
    }
    const int64_t tile_apart = tokens * TILE;
    alignas(64) Bf16 values[TILE_COLUMNS * native::TILED_LATENT_TOKENS];
    for (int64_t column = 0; column < padded; column += TILE_COLUMNS) {
        const int64_t rest = shape.token_elements - column, there = rest < TILE_COLUMNS ? rest : TILE_COLUMNS;
        pair_values(rows + column, shape.token_elements, tile.tokens, there, tile_apart, values);
        const int64_t passed = num_bytes * column / padded, until = num_bytes * (column + TILE_COLUMNS) / padded;
        TileRows heads[] = {{
            weights, shape.tile_tokens, true, RowsAhead(next ? next + passed : nullptr, 0, until - passed, 1),
            {summed + column, padded, TILE * padded, TILE},
        }};
        multiply_stretch(tiles, heads, shape.heads, tokens, {values, tile_apart, 2}, false);
    }
}

// As `attend_latent`, for heads of whole tiles.
inline void attend_latent_by_tiles(
    const Heads& shape, const Bf16* queries, const char* cache, int64_t tokens, const void* following,
    float* state_memory, float* scratch) {
    const State state(shape, state_memory);
    begin(shape, state);
    const int64_t dim = shape.token_elements, most = shape.tile_tokens;
    float* const factors = scratch;
    float* const scores = factors + shape.heads;
    Bf16* const arranged = reinterpret_cast<Bf16*>(scores + most * shape.heads);
    Bf16* const weights = arranged + native::arranged_elements(shape.heads, dim);
    float* const elements = reinterpret_cast<float*>(weights + shape.heads * most);
    for (int64_t head = 0; head < shape.heads; head += TILE) {
        const Bf16* rows[TILE];
        for (int h = 0; h < TILE; ++h) rows[h] = queries + (head + h) * dim;
        arrange(rows, TILE, dim, arranged + native::arranged_elements(head, dim));
    }
    Tiles tiles;
    Fetcher none;
    for (int64_t start = 0; start < tokens; start += most) {
        const char* const here = cache + start * shape.token_bytes;
        const int64_t rest = tokens - start, later = rest - most;
        const TokenTile tile = {rest < most ? rest : most, scores, factors, none, 1};
        const char* const next = later > 0 ? here + most * shape.token_bytes : static_cast<const char*>(following);
        const int64_t num_bytes = (later > 0 && later < most ? later : tile.tokens) * shape.token_bytes / 2;
        const Bf16* const rows = rows_of<Bf16>(shape.coded, here, tile.tokens, elements);
        multiply_keys(tiles, shape, tile, rows, arranged, RowsAhead(next, 0, num_bytes, 1));
        weigh<Bf16>(shape, tile, state);
        multiply_values(
            tiles, shape, tile, rows, state.values, weights, next ? next + num_bytes : nullptr, num_bytes);
    }
}

}  // namespace
